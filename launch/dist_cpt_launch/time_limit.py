"""How long before the end of its time a run must be told, from what its steps and saves took so far."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DEFAULT_LEAD_SECONDS = 300  # before anything was measured
MARGIN_SECONDS = 90  # Slurm may signal up to 60 s late or early; the ranks close W&B, write exit.json and the report
STEPS = 256  # the last ones count
TAIL_BYTES = 1 << 18  # of metrics.jsonl: more than STEPS rows


def lead_seconds(run_folder: Path) -> int:
    """Seconds between the stop signal and the end of a save: a step, an evaluation, two saves, and a margin.

    Two saves, because one may be in the making when the signal comes. The slowest of each that the run folder
    knows counts. Before the first step there is a default; before the first save, in the place of saves and margin.
    """
    rows = list(deque(read_jsonl(run_folder / "metrics.jsonl", TAIL_BYTES), maxlen=STEPS))
    steps = _numbers(rows, "step_seconds")
    events = (row for row in read_jsonl(run_folder / "events.jsonl") if row.get("kind") == "checkpoint")
    saves = _numbers(events, "seconds")
    if not steps:
        return DEFAULT_LEAD_SECONDS
    saving = MARGIN_SECONDS + 2 * max(saves) if saves else DEFAULT_LEAD_SECONDS
    return round(max(steps) + evaluation_seconds(run_folder, rows) + saving)


def evaluation_seconds(run_folder: Path, rows: list[dict[str, Any]]) -> float:
    """An upper bound of one evaluation of all sets: its tokens at the speed of training, which does more per token."""
    tokens: dict[str, float] = {}
    for row in read_jsonl(run_folder / "evaluations.jsonl"):
        for count in _numbers([row], "num_tokens"):
            tokens[str(row.get("name"))] = count
    speeds = [speed for speed in _numbers(rows, "tokens_per_second") if speed > 0]
    return sum(tokens.values()) / min(speeds) if speeds else 0.0


def newest_step(run_folder: Path) -> int:
    """The step of the newest published checkpoint; -1 if there is none."""
    found = run_folder.glob("checkpoints/step-*/manifest.json")
    return max((int(path.parent.name[5:]) for path in found if path.parent.name[5:].isdigit()), default=-1)


def read_jsonl(path: Path, tail_bytes: int | None = None) -> Iterator[dict[str, Any]]:
    """The objects of a .jsonl file, or in its end; lines that are none, and a file that is absent, are passed over."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0 if tail_bytes is None else max(size - tail_bytes, 0))
            lines = file.read().splitlines()
    except OSError:
        return
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            yield row


def _numbers(rows: Any, key: str) -> list[float]:
    return [float(row[key]) for row in rows if isinstance(row.get(key), int | float)]
