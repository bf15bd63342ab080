"""What the rows of evaluations.jsonl say about forgetting: pure functions, for training, pruning and display."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dist_cpt.config.schema import ForgettingConfig
from dist_cpt.run_folder.json_files import rows_or_problem
from dist_cpt.run_folder.names import EVALUATIONS

Rows = Sequence[dict[str, Any]]


def rises(rows: Rows, step: int) -> dict[str, float]:
    """By retention set: how far its loss after `step` is above that under the base, in nats per token."""
    found = {}
    for row in rows:
        loss, base = _real(row.get("loss")), _real(row.get("base_loss"))
        if row.get("step") == step and row.get("role") == "retention" and loss is not None and base is not None:
            found[str(row.get("name"))] = loss - base
    return found


def over_limit(rows: Rows, step: int, loss_rise: float) -> dict[str, float]:
    """The `rises` above `loss_rise`."""
    return {name: rise for name, rise in rises(rows, step).items() if rise > loss_rise}


def best_step(rows: Rows, loss_rise: float) -> int | None:
    """The step with the lowest mean loss over the domain sets, of those where no retention set is over the limit; if
    all are, the step where the largest rise is least. Step 0 does not count."""
    within, beyond = {}, {}
    for step in sorted({row["step"] for row in rows if isinstance(row.get("step"), int) and row["step"] > 0}):
        losses = [_real(row.get("loss")) for row in rows if row.get("step") == step]
        learned = [_real(row.get("loss")) for row in rows if row.get("step") == step and row["role"] == "domain"]
        if not losses or None in losses:
            continue
        largest = max(rises(rows, step).values(), default=0.0)
        values = [loss for loss in learned or losses if loss is not None]
        if largest <= loss_rise:
            within[step] = math.fsum(values) / len(values)
        beyond[step] = largest
    candidates = within or beyond
    return min(candidates, key=lambda step: (candidates[step], -step)) if candidates else None


def recorded_best(folder: Path, forgetting: ForgettingConfig | None) -> int | None:
    """The `best_step` of a run whose policy is keep_best, read from its record."""
    if forgetting is None or forgetting.policy != "keep_best":
        return None
    return best_step(rows_or_problem(folder / EVALUATIONS, []), forgetting.loss_rise)


def previous_step(rows: Rows, step: int) -> int | None:
    """The evaluation before that of `step`."""
    return max((row["step"] for row in rows if isinstance(row.get("step"), int) and row["step"] < step), default=None)


def _real(value: Any) -> float | None:
    """A finite number, or None for everything else."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
