"""The same run under every launcher that starts ranks on hosts; Slurm's is in tests/slurm."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dist_cpt.run_folder.audit import record_problems
from tests import tiny
from tests.whole_run import rows

BIN = Path(sys.executable).parent
HERE = [sys.executable, "-m", "dist_cpt.cli", "launch", "RECIPE"]
MEET = ["--nodes", "2", "--rdzv", "127.0.0.1:29547"]
# fmt: off
COMMANDS = {
    "accelerate": [str(BIN / "accelerate"), "launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
                   "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "29548",
                   "--module", "dist_cpt.cli", "train", "RECIPE"],
    "deepspeed": [str(BIN / "deepspeed"), "--num_gpus", "2", "--no_local_rank", "--master_port", "29549",
                  "--module", "dist_cpt.cli", "train", "RECIPE"],
    "two hosts": [*HERE, *MEET],
}
# fmt: on
pytestmark = pytest.mark.matrix


@pytest.mark.parametrize("name", COMMANDS)
def test_two_ranks_under(name, made, tmp_path):
    values = tiny.recipe(*made, tmp_path / "runs", engine={"kind": "fsdp", "shard": "full"})
    recipe = tiny.write_recipe(tmp_path / "r.yaml", values)
    command = [str(recipe) if word == "RECIPE" else word for word in COMMANDS[name]]
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "PATH": f"{BIN}:{os.environ['PATH']}"}
    log = tmp_path / "log"
    with log.open("w") as output:
        hosts = [
            subprocess.Popen(command, env=environment, stdout=output, stderr=output, cwd=tmp_path)
            for _ in range(2 if name == "two hosts" else 1)
        ]
        try:
            codes = [host.wait(200) for host in hosts]
        finally:
            for host in hosts:
                host.kill()
                host.wait()
    assert set(codes) == {0}, log.read_text()[-4000:]
    run = tmp_path / "runs/tiny"
    (started,) = [row for row in rows(run / "events.jsonl") if row["kind"] == "start"]
    assert started["world_size"] == 2
    assert [row["step"] for row in rows(run / "metrics.jsonl")] == list(range(1, 13))
    assert record_problems(run) == []


def test_a_killed_agent_leaves_no_rank_behind(made, tmp_path):
    """torchrun's agent alone is killed, as the kernel does when memory runs out: its ranks save and end."""
    values = tiny.recipe(*made, tmp_path / "runs", engine={"kind": "fsdp", "shard": "full"})
    values["train"] = {"tokens": 4000 * 8 * tiny.SEQ_LEN}
    recipe = tiny.write_recipe(tmp_path / "r.yaml", values)
    run = tmp_path / "runs/tiny"
    launcher = subprocess.Popen([sys.executable, "-m", "dist_cpt.cli", "launch", str(recipe), "--procs-per-node", "2"])
    try:
        wait_for(lambda: (run / "metrics.jsonl").exists() and len(rows(run / "metrics.jsonl")) > 5)
        (agent,) = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
        os.kill(int(agent), signal.SIGKILL)
        assert launcher.wait(20) == 70
        wait_for(lambda: (run / "exit.json").exists())
    finally:
        launcher.kill()
        launcher.wait()
    ended = json.loads((run / "exit.json").read_text())
    assert (ended["code"], ended["reason"].split(":")[0]) == (75, "SIGTERM")
    assert (run / f"checkpoints/step-{ended['step']:08d}/manifest.json").exists()


def test_a_killed_launcher_leaves_no_rank_behind_and_the_same_command_waits_for_their_end(made, tmp_path):
    values = tiny.recipe(*made, tmp_path / "runs", engine={"kind": "fsdp", "shard": "full"})
    values["train"] = {"tokens": 4000 * 8 * tiny.SEQ_LEN}
    recipe = tiny.write_recipe(tmp_path / "r.yaml", values)
    run = tmp_path / "runs/tiny"
    command = [sys.executable, "-m", "dist_cpt.cli", "launch", str(recipe), "--procs-per-node", "2"]
    environment = os.environ | {"DIST_CPT_FAULT": "save.staged:rank0:attempt0:slow"}
    with subprocess.Popen(command, env=environment) as launcher:
        wait_for(lambda: (run / "metrics.jsonl").exists() and len(rows(run / "metrics.jsonl")) > 5)
        launcher.kill()
    with subprocess.Popen(command) as again:
        wait_for(lambda: [row["kind"] for row in rows(run / "events.jsonl")].count("resume") == 1)
        again.send_signal(signal.SIGTERM)
        assert again.wait(180) == 75
    (first, second) = [*json.loads((run / "run.json").read_text())["ends"], json.loads((run / "exit.json").read_text())]
    assert (first["code"], first["reason"].split(":")[0], second["code"]) == (75, "SIGTERM", 75)
    steps = [row["step"] for row in rows(run / "metrics.jsonl")]
    assert steps == list(range(1, second["step"] + 1))
    assert record_problems(run) == []


def wait_for(met, seconds: float = 180.0) -> None:
    until = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < until
        time.sleep(0.1)
