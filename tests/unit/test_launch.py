"""The launcher: what it would run, and what it says when that cannot work. No torch, no ranks."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from dist_cpt_launch.launch_options import LaunchOptions
from dist_cpt_launch.launch_plan import LaunchPlan, local_plan
from dist_cpt_launch.local import run_local

from dist_cpt.config.load import build
from dist_cpt.errors import ConfigError
from dist_cpt.health.heartbeats import Heartbeat, process_start, write_heartbeat
from tests import tiny
from tests.command import command


@pytest.fixture
def config(tmp_path):
    return build(tiny.recipe(tmp_path / "base", tmp_path / "c.jsonl", tmp_path / "runs", engine="auto"), "x")


def test_one_rank_is_a_plain_process_and_more_go_through_torchrun(config, tmp_path):
    recipe = tmp_path / "recipe $(touch owned).yaml"
    alone = local_plan(config, recipe, ["seed=0"], LaunchOptions(), threads_per_rank=2)
    assert alone.argv[1:] == ("-m", "dist_cpt.cli", "train", str(recipe), "--set", "seed=0")
    four = local_plan(config, recipe, [], LaunchOptions(procs_per_node=4), threads_per_rank=1)
    assert "--nproc-per-node=4" in four.argv
    assert four.argv[-4:] == ("-m", "dist_cpt.cli", "train", str(recipe))
    assert four.environment["OMP_NUM_THREADS"] == "1"
    assert "'" + str(recipe) + "'" in four.shell_line()


def test_a_module_planted_in_the_current_folder_is_not_run(config, tmp_path):
    (tmp_path / "yaml.py").write_text("open('planted', 'w').close()\n")
    plan = local_plan(config, tmp_path / "missing.yaml", [], LaunchOptions(), threads_per_rank=1)
    done = subprocess.run(plan.argv, env=os.environ | plan.environment, cwd=tmp_path, check=False, capture_output=True)
    assert done.returncode == 64
    assert not (tmp_path / "planted").exists()


def test_ranks_that_cannot_divide_the_batch_are_refused_before_anything_starts(config, tmp_path):
    with pytest.raises(ConfigError, match=r"batch\.global_tokens.* 3 ranks"):
        local_plan(config, tmp_path / "r.yaml", [], LaunchOptions(procs_per_node=3), threads_per_rank=1)
    single = config.model_copy(update={"engine": config.engine.model_copy(update={"kind": "single"})})
    with pytest.raises(ConfigError, match=r"engine\.kind: single"):
        local_plan(single, tmp_path / "r.yaml", [], LaunchOptions(procs_per_node=2), threads_per_rank=1)


def code_of(tmp_path, program: str) -> int:
    return run_local(LaunchPlan((sys.executable, "-c", program), {}, tmp_path))


def test_the_exit_code_is_the_runs_own(tmp_path):
    assert code_of(tmp_path, "raise SystemExit(64)") == 64
    write = f"open({str(tmp_path / 'exit.json')!r}, 'w').write('{{\"code\": 75}}'); raise SystemExit(1)"
    assert code_of(tmp_path, write) == 75
    assert code_of(tmp_path / "elsewhere", "import os; os.kill(os.getpid(), 9)") == 70


def test_an_older_exit_json_is_not_believed(tmp_path):
    (tmp_path / "exit.json").write_text('{"code": 0}')
    os.utime(tmp_path / "exit.json", (1, 1))
    assert code_of(tmp_path, "raise SystemExit(71)") == 71


def test_an_exit_json_is_this_starts_own_if_it_has_changed(tmp_path):
    path = tmp_path / "exit.json"
    path.write_text('{"code": 75}')  # of a start that ended a moment ago
    assert code_of(tmp_path, "raise SystemExit(64)") == 64
    write = f"import os; os.chdir({str(tmp_path)!r}); open('exit.json', 'w').write('{{\"code\": 75}}')"
    write += "; os.utime('exit.json', (1, 1)); raise SystemExit(1)"
    assert code_of(tmp_path, write) == 75  # the file server's clock is behind


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_the_third_signal_also_kills_ranks_in_sessions_of_their_own(tmp_path):
    # As torchrun's agent starts them.
    agent = (
        "import signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        "rank = subprocess.Popen(['sleep', '60'], start_new_session=True); print(rank.pid, file=open(sys.argv[1], 'w'),"
        "flush=True); time.sleep(60)"
    )
    pid = tmp_path / "pid"

    def three_times() -> None:
        while not (pid.exists() and pid.read_text().strip()):
            time.sleep(0.05)
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)

    sender = threading.Thread(target=three_times)
    sender.start()
    assert run_local(LaunchPlan((sys.executable, "-c", agent, str(pid)), {}, tmp_path)) == 70
    sender.join()
    until = time.monotonic() + 5.0
    while alive(int(pid.read_text())) and time.monotonic() < until:
        time.sleep(0.05)
    assert not alive(int(pid.read_text()))


def test_ranks_whose_agent_is_killed_are_told_to_stop(tmp_path):
    rank = (
        "import sys, time; from dist_cpt.runtime.stop import StopRequest, stop_with_parent; "
        "stop = StopRequest().install(); stop_with_parent(); print('ready', flush=True)\n"
        "while not stop.requested: time.sleep(0.01)\n"
        "open(sys.argv[1], 'w').write(stop.requested)"
    )
    agent = "import subprocess, sys; subprocess.run([sys.executable, *sys.argv[1:]], start_new_session=True)"
    received = tmp_path / "received"
    with subprocess.Popen([sys.executable, "-c", agent, "-c", rank, str(received)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.kill()
    until = time.monotonic() + 5.0
    while not (received.exists() and received.read_text()) and time.monotonic() < until:
        time.sleep(0.02)
    assert received.read_text() == "SIGTERM"


def test_torchrun_waits_for_saves_as_long_as_they_were(config, tmp_path):
    run = tmp_path / "runs/tiny"
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text('{"step": 1, "step_seconds": 20.0}\n')
    (run / "events.jsonl").write_text('{"kind": "checkpoint", "seconds": 300.0}\n')
    argv = local_plan(config, tmp_path / "r.yaml", [], LaunchOptions(procs_per_node=2), threads_per_rank=1).argv
    assert "--shutdown-timeout=710" in argv


def test_a_run_folder_that_was_moved_does_not_begin_again_elsewhere(tmp_path):
    values = tiny.recipe(tmp_path / "base", tmp_path / "c.jsonl", tmp_path / "runs")
    moved = tmp_path / "moved/tiny"
    (moved / "checkpoints/step-00000004").mkdir(parents=True)
    (moved / "checkpoints/step-00000004/manifest.json").touch()
    tiny.write_recipe(moved / "recipe.yaml", values)
    ended = command("resume", moved, "--dry-run")
    assert ended.code == 0
    assert f'output_dir="{moved.parent}"' in ended.out
    ended = command("resume", moved, "--dry-run", "--set", "output_dir=elsewhere")
    assert (ended.code, len(ended.error_lines)) == (64, 1)
    assert "--set output_dir" in ended.error_lines[0]
    (tmp_path / "runs").symlink_to(moved.parent)  # another name of the same place
    assert command("resume", moved, "--dry-run").code == 0


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["launch", "RECIPE", "--on", "moon"], "--on moon"),
        (["launch", "RECIPE", "--nodes", "2"], "--nodes 2"),
        (["resume", "FOLDER"], "recipe.yaml"),
        (["launch", "nowhere.yaml"], "nowhere.yaml"),
        (["train", "RECIPE", "--set", "optim.lr=fast"], "optim.lr"),
        (["tarin", "RECIPE"], "train"),
        (["launch"], "RECIPE"),
    ],
)
def test_bad_commands_end_with_64_and_one_line(tmp_path, arguments, named):
    recipe = tiny.write_recipe(
        tmp_path / "r.yaml", tiny.recipe(tmp_path / "base", tmp_path / "c.jsonl", tmp_path / "runs", engine="auto")
    )
    values = {"RECIPE": str(recipe), "FOLDER": str(tmp_path)}
    command = [sys.executable, "-m", "dist_cpt.cli", *[values.get(a, a) for a in arguments]]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 64, done.stderr
    (line,) = done.stderr.splitlines()
    assert named in line


def test_dry_run_prints_the_command_and_starts_nothing(tmp_path):
    recipe = tiny.write_recipe(
        tmp_path / "r.yaml", tiny.recipe(tmp_path / "base", tmp_path / "c.jsonl", tmp_path / "runs", engine="auto")
    )
    command = [sys.executable, "-m", "dist_cpt.cli", "launch", str(recipe), "--procs-per-node", "2", "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "--nproc-per-node=2" in done.stdout
    assert not (tmp_path / "runs").exists()


def test_from_start_moves_the_earlier_run_aside(tmp_path, capfd):
    recipe = tiny.write_recipe(tmp_path / "r.yaml", tiny.recipe(tmp_path / "base", tmp_path / "c.jsonl", tmp_path))
    run = tmp_path / "tiny"
    (run / "logs").mkdir(parents=True)
    here = (socket.gethostname(), os.getpid(), process_start(os.getpid()))
    beat = Heartbeat(0, *here, 0, 3, "training", "", time.time(), 0.0)
    write_heartbeat(run, beat)
    ended = command("launch", recipe, "--from-start")
    assert ended.code == 64
    assert "rank 0" in ended.err
    write_heartbeat(run, replace(beat, ended=True))
    assert command("launch", recipe, "--from-start").code == 64  # its base does not exist
    assert [path.name[:12] for path in tmp_path.glob("tiny.before-*")] == ["tiny.before-"]
