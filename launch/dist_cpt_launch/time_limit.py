"""Time limits: Slurm's notation, and how long before a limit a run must be told to stop and save."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dist_cpt.run_folder.checkpoints import published, step_of
from dist_cpt.run_folder.json_files import rows_or_problem
from dist_cpt.run_folder.names import EVALUATIONS, EVENTS, MANIFEST, METRICS
from dist_cpt.storage import is_there

DEFAULT_SAVE_SECONDS = 300  # before a save was measured
MARGIN_SECONDS = 90  # Slurm signals up to 60 s early or late; the ranks also close W&B and write exit.json, the report
NUM_STEPS = 256  # the most recent ones
TAIL_BYTES = 1 << 18  # of metrics.jsonl: more than NUM_STEPS rows


def slurm_seconds(text: str) -> float | None:
    """Seconds of `MINUTES`, `MM:SS`, `HH:MM:SS`, `D-HH`, `D-HH:MM` or `D-HH:MM:SS`; None for anything else.

    Source: sbatch(1), --time.
    """
    if not re.fullmatch(r"(\d+-)?\d+(:\d\d){0,2}", text):
        return None
    days, dash, clock = text.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    units = (3600, 60, 1) if dash or len(parts) == 3 else (60, 1)
    return float(86400 * int(days or 0) + sum(part * unit for part, unit in zip(parts, units, strict=False)))


def save_before_limit(run_folder: Path) -> int:
    """Seconds from the stop signal to the end of a save: a step, an evaluation, two saves, and a margin.

    Two saves, since one may be in progress when the signal arrives. Steps and saves count with their slowest
    measured time; before the first step or save a default is used.
    """
    steps = rows_or_problem(run_folder / METRICS, [], TAIL_BYTES)[-NUM_STEPS:]
    step_seconds = _numbers(steps, "step_seconds")
    if not step_seconds:
        return DEFAULT_SAVE_SECONDS
    events = rows_or_problem(run_folder / EVENTS, [])
    saves = _numbers((event for event in events if event.get("kind") == "checkpoint"), "seconds")
    saving = MARGIN_SECONDS + 2 * max(saves) if saves else DEFAULT_SAVE_SECONDS
    return round(max(step_seconds) + _evaluation_seconds(run_folder, steps) + saving)


def newest_step(run_folder: Path) -> int:
    """The step of the newest published checkpoint; -1 if there is none."""
    return next((step_of(path) for path in published(run_folder) if is_there(path / MANIFEST)), -1)


def _evaluation_seconds(run_folder: Path, steps: list[dict[str, Any]]) -> float:
    """An upper bound: the held-out tokens at the slowest training speed, which does more work per token."""
    speeds = [speed for speed in _numbers(steps, "tokens_per_second") if speed > 0]
    rows = rows_or_problem(run_folder / EVALUATIONS, [])
    num_tokens = {str(row.get("name")): count for row in rows for count in _numbers([row], "num_tokens")}
    return sum(num_tokens.values()) / min(speeds) if speeds else 0.0


def _numbers(rows: Iterable[dict[str, Any]], key: str) -> list[float]:
    return [float(row[key]) for row in rows if isinstance(row.get(key), int | float)]
