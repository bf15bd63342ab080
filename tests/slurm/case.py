"""A run on the cluster, and what must be true of it when it has ended."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_cpt.checkpoint.verify import verify_run
from dist_cpt.run_folder.audit import record_problems
from tests import tiny
from tests.slurm.cluster import Cluster
from tests.whole_run import rows

BLOCKS = 16  # per step


@dataclass
class Case:
    """One run and its job."""

    cluster: Cluster
    recipe: Path
    run: Path
    steps: int
    job: str = ""

    def launch(self, *options: str, **environment: str) -> Case:
        """`dist-cpt launch --on slurm`, two nodes with a rank each unless the options say otherwise."""
        command = ["launch", str(self.recipe), "--on", "slurm", "--no-preflight", "--nodes=2", *options]
        done = self.cluster.run(
            sys.executable, "-m", "dist_cpt.cli", *command, check=False, WANDB_MODE="offline", **environment
        )
        assert done.returncode == 0, done.stderr
        self.job = re.findall(r"^job (\d+),", done.stdout, re.MULTILINE)[0]
        return self

    def wait_for_step(self, step: int, timeout_seconds: float = 120.0) -> None:
        """Wait until metrics.jsonl has the row of a step."""
        deadline = time.monotonic() + timeout_seconds
        while self.step() < step:
            assert time.monotonic() < deadline, f"step {self.step()} of {step}\n{self.log()[-4000:]}"
            time.sleep(0.1)

    def wait_for_log(self, pattern: str, timeout_seconds: float = 120.0) -> None:
        """Wait until the job's log matches."""
        deadline = time.monotonic() + timeout_seconds
        while not re.search(pattern, self.log()):
            assert time.monotonic() < deadline, f"{pattern!r} is not in\n{self.log()[-4000:]}"
            time.sleep(0.1)

    def finish(self, state: str = "COMPLETED", timeout_seconds: float = 200.0) -> dict[str, str]:
        """Wait until the job has ended, and assert its state."""
        ends = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")
        ended = self.cluster.wait_for(self.job, ends, timeout_seconds)
        assert ended["JobState"] == state, f"{ended}\n{self.log()[-6000:]}"
        return ended

    def step(self) -> int:
        path = self.run / "metrics.jsonl"
        try:
            return json.loads(path.read_bytes().splitlines()[-1])["step"]
        except (OSError, ValueError, IndexError):
            return 0

    def log(self) -> str:
        path = self.run / "logs/slurm.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def launches(self, kind: str) -> list[dict[str, Any]]:
        return [row for row in rows(self.run / "launches.jsonl") if row["kind"] == kind]

    def attempts(self) -> list[dict[str, Any]]:
        """How every attempt of the ranks began."""
        return [row for row in rows(self.run / "events.jsonl") if row["kind"] in ("start", "resume")]

    def complete(self, log: Path | None = None) -> None:
        """Assert: every block once, checkpoints and record valid, the certificate passes, one log, one W&B run."""
        metrics = rows(self.run / "metrics.jsonl")
        assert [row["step"] for row in metrics] == list(range(1, self.steps + 1))
        assert [row["position"] for row in metrics] == [[BLOCKS * i, BLOCKS * (i + 1)] for i in range(self.steps)]
        assert all(problems == [] for problems in verify_run(self.run).values())
        assert record_problems(self.run) == []
        attempts = self.attempts()
        assert len({row["wandb_run_id"] for row in attempts}) == 1
        offline = {path.name.rsplit("-", 1)[1] for path in (self.run / "wandb").glob("offline-run-*")}
        assert offline == {attempts[0]["wandb_run_id"]}
        if any(row["kind"] == "resume" for row in attempts):
            assert json.loads((self.run / "certificate.json").read_text())["verdict"] == "pass"
        text = self.log() if log is None else log.read_text()
        assert len(re.findall(r" starting: srun .* train ", text)) >= len(attempts)


def case(cluster: Cluster, made: tuple[Path, Path], folder: Path, steps: int, **changes: Any) -> Case:
    """A recipe of `steps` steps, with a checkpoint every four."""
    values = tiny.recipe(
        *made,
        folder / "runs",
        embeddings={"train": []},
        batch={"global_tokens": BLOCKS * tiny.SEQ_LEN, "micro_batch": 1},
        train={"tokens": steps * BLOCKS * tiny.SEQ_LEN},
        engine={"kind": "fsdp", "shard": "full"},
        checkpoint={"every_steps": 4, "asynchronous": False},
        track={"wandb": {"mode": "offline"}},
    )
    values |= changes
    recipe = tiny.write_recipe(folder / f"{values['name']}.yaml", values)
    return Case(cluster, recipe, folder / "runs" / values["name"], steps)


def processes(pattern: str) -> list[int]:
    """Ids of processes whose command line contains a text."""
    done = subprocess.run(["pgrep", "-f", pattern], capture_output=True, text=True, check=False)
    return [int(line) for line in done.stdout.split()]
