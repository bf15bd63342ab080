"""The records of a few training steps, as the W&B observer receives them, and its own processes."""

from __future__ import annotations

import math
import os
import subprocess
from dataclasses import replace
from pathlib import Path

from dist_cpt.run_folder.records import CheckpointRecord, EvaluationRecord, RunEnd, RunStart, SourceSize, StepRecord
from dist_cpt.run_folder.train_state import SourceCounts
from dist_cpt.train.wandb import WandbObserver
from tests.small_config import config


def services() -> list[int]:
    """Pids of the wandb services that this process started."""
    listing = subprocess.run(
        ["ps", "--ppid", str(os.getpid()), "-o", "pid=,stat=,comm="], capture_output=True, text=True
    )
    fields = [line.split(None, 2) for line in listing.stdout.splitlines()]
    return [int(pid) for pid, stat, name in fields if "wandb" in name and not stat.startswith("Z")]


def start(folder: Path, **changes: object) -> RunStart:
    values: dict[str, object] = {
        "config": config(),
        "folder": folder,
        "engine": "zero-3",
        "world_size": 2,
        "device": "cpu",
        "num_steps": 10,
        "first_step": 0,
        "resumed_from": None,
        "wandb_run_id": "0a1b2c3d",
        "contract": {},
        "attempt": 0,
        "sources": (SourceSize("law", 20, 1200, 1.0),),
    }
    return RunStart(**(values | changes))  # type: ignore[arg-type]


def record(step: int, loss: float = 2.0) -> StepRecord:
    row = StepRecord(step, loss, None, True, 1, {"adapter": 1e-4}, (0, 2), 120, 120, {"law": 124}, 1000.0, 0.12, 1.5, 0)
    return replace(
        row, batch_tokens=128 * step, totals_by_source={"law": SourceCounts(2 * step, 124 * step, 120 * step)}
    )


def train_a_little(observer: WandbObserver, folder: Path, first: int = 1) -> None:
    observer.on_start(start(folder))
    observer.on_message("hello")
    for step in range(first, first + 3):
        observer.on_step(record(step, math.nan if step == 2 else 2.0))
    observer.on_evaluation(EvaluationRecord(first + 2, "law", "domain", 2.0, 7.39, 100, 0))
    observer.on_checkpoint(CheckpointRecord(first + 2, "step-00000003", 0.1, 10, 0.1))
    observer.on_end(RunEnd(0, "done", first + 2))
