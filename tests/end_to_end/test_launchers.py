"""The same run under every launcher that starts ranks on hosts; Slurm's is in tests/slurm."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dist_cpt.train.record import record_problems
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
