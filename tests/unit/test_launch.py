"""The launcher: what it would run, and what it says when that cannot work. No torch, no ranks."""

from __future__ import annotations

import subprocess
import sys

import pytest
from dist_cpt_launch.local import run_local
from dist_cpt_launch.plan import LaunchPlan, local_plan

from dist_cpt.config.load import build
from dist_cpt.errors import ConfigError
from tests import tiny


@pytest.fixture
def config(tmp_path):
    return build(tiny.recipe(tmp_path / "base", tmp_path / "c.jsonl", tmp_path / "runs", engine="auto"), "x")


def test_one_rank_is_a_plain_process_and_more_go_through_torchrun(config, tmp_path):
    recipe = tmp_path / "recipe $(touch owned).yaml"
    alone = local_plan(config, recipe, ["seed=0"], procs_per_node=1, threads_per_rank=2)
    assert alone.argv[1:] == ("-m", "dist_cpt.cli", "train", str(recipe), "--set", "seed=0")
    four = local_plan(config, recipe, [], procs_per_node=4, threads_per_rank=1)
    assert "--nproc-per-node=4" in four.argv
    assert four.argv[-4:] == ("-m", "dist_cpt.cli", "train", str(recipe))
    assert four.environment["OMP_NUM_THREADS"] == "1"
    assert "'" + str(recipe) + "'" in four.shown()


def test_ranks_that_cannot_divide_the_batch_are_refused_before_anything_starts(config, tmp_path):
    with pytest.raises(ConfigError, match="does not divide by 3 ranks"):
        local_plan(config, tmp_path / "r.yaml", [], procs_per_node=3, threads_per_rank=1)
    single = config.model_copy(update={"engine": config.engine.model_copy(update={"kind": "single"})})
    with pytest.raises(ConfigError, match="runs on one rank, not on 2"):
        local_plan(single, tmp_path / "r.yaml", [], procs_per_node=2, threads_per_rank=1)


def code_of(tmp_path, program: str) -> int:
    return run_local(LaunchPlan((sys.executable, "-c", program), {}, tmp_path))


def test_the_exit_code_is_the_runs_own(tmp_path):
    assert code_of(tmp_path, "raise SystemExit(64)") == 64
    write = f"open({str(tmp_path / 'exit.json')!r}, 'w').write('{{\"code\": 75}}'); raise SystemExit(1)"
    assert code_of(tmp_path, write) == 75
    assert code_of(tmp_path / "elsewhere", "import os; os.kill(os.getpid(), 9)") == 70


def test_an_older_exit_json_is_not_believed(tmp_path):
    import os

    (tmp_path / "exit.json").write_text('{"code": 0}')
    os.utime(tmp_path / "exit.json", (1, 1))
    assert code_of(tmp_path, "raise SystemExit(71)") == 71


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["launch", "RECIPE", "--on", "moon"], "expected local, slurm or kubernetes"),
        (["launch", "RECIPE", "--nodes", "2"], "this host only"),
        (["resume", "FOLDER"], "not a run folder"),
        (["launch", "nowhere.yaml"], "recipe not found: nowhere.yaml"),
        (["train", "RECIPE", "--set", "optim.lr=fast"], "optim.lr"),
        (["tarin", "RECIPE"], "train"),
        (["launch"], "RECIPE"),
    ],
)
def test_bad_commands_end_with_64_and_one_line(tmp_path, arguments, said):
    recipe = tiny.write_recipe(
        tmp_path / "r.yaml", tiny.recipe(tmp_path / "base", tmp_path / "c.jsonl", tmp_path / "runs", engine="auto")
    )
    values = {"RECIPE": str(recipe), "FOLDER": str(tmp_path)}
    command = [sys.executable, "-m", "dist_cpt.cli", *[values.get(a, a) for a in arguments]]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 64, done.stderr
    (line,) = done.stderr.splitlines()
    assert said in line


def test_dry_run_prints_the_command_and_starts_nothing(tmp_path):
    recipe = tiny.write_recipe(
        tmp_path / "r.yaml", tiny.recipe(tmp_path / "base", tmp_path / "c.jsonl", tmp_path / "runs", engine="auto")
    )
    command = [sys.executable, "-m", "dist_cpt.cli", "launch", str(recipe), "--procs-per-node", "2", "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "--nproc-per-node=2" in done.stdout
    assert not (tmp_path / "runs").exists()
