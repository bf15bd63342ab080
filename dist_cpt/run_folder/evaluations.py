"""What the rows of evaluations.jsonl say: what was forgotten, which step is best, and whether to go on.

Pure functions, for training, pruning, merging and display.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dist_cpt.config.schema import BestConfig, EvaluateConfig
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


def keeps_best(config: EvaluateConfig) -> bool:
    """Whether a run keeps the checkpoint of its `best_step`."""
    return config.best is not None or _retention_limit(config) is not None


def best_step(rows: Rows, config: EvaluateConfig) -> int | None:
    """The first step that is best by `evaluate.best`, else by the mean loss over the domain sets; None without any.

    With `forgetting.policy: keep_best` it is one where no retention set is over the limit; if all are, the step where
    the largest rise is least. Step 0 does not count, nor an evaluation under way: a save beside it prunes by this.
    """
    limit = _retention_limit(config)
    rows = _without_unfinished(rows)
    within, beyond = {}, {}
    for step, value in _compared(rows, config.best):
        largest = max(rises(rows, step).values(), default=0.0)
        if limit is None or largest <= limit:
            within[step] = value
        beyond[step] = largest
    candidates = within or beyond
    return min(candidates, key=lambda step: (candidates[step], step)) if candidates else None


def recorded_best(folder: Path, config: EvaluateConfig) -> int | None:
    """The `best_step` of a run that keeps it, read from its record."""
    return best_step(rows_or_problem(folder / EVALUATIONS, []), config) if keeps_best(config) else None


def reason_to_end(rows: Rows, step: int, config: EvaluateConfig) -> str | None:
    """Why a run ends after the evaluation of `step`; None: it continues. Step 0 ends none."""
    limit, best = config.forgetting, config.best
    if step == 0:
        return None
    if limit is not None and limit.policy == "stop" and over_limit(rows, step, limit.loss_rise):
        return describe_rise(rows, step, limit.loss_rise)
    if best is None or best.patience is None or (first := best_step(rows, config)) is None:
        return None
    later = {other for row in rows if isinstance(other := row.get("step"), int) and first < other <= step}
    if len(later) < best.patience:
        return None
    return f"{best.of} is best after step {first}, and no better in the {len(later)} evaluations since"


def describe_rise(rows: Rows, step: int, loss_rise: float) -> str:
    """Which retention sets are over the limit after `step`, and by how much."""
    shown = ", ".join(f"{name} by {rise:.4f}" for name, rise in over_limit(rows, step, loss_rise).items())
    return f"after step {step} the loss is above the base's by more than {loss_rise:g}: {shown}"


def previous_step(rows: Rows, step: int) -> int | None:
    """The evaluation before that of `step`."""
    return max((row["step"] for row in rows if isinstance(row.get("step"), int) and row["step"] < step), default=None)


def numbers_of(rows: Rows, step: int, best: BestConfig) -> dict[str, float]:
    """By key: what the row that `evaluate.best` is about has after `step`."""
    name, _ = best.name_and_key
    found = [row for row in rows if row.get("step") == step and row.get("name") == name]
    values = {key: _real(value) for row in found for key, value in row.items() if key not in _NOT_MEASURED}
    return {key: value for key, value in values.items() if value is not None}


_NOT_MEASURED = ("step", "attempt", "num_tokens", "base_loss")


def _without_unfinished(rows: Rows) -> Rows:
    """Without the newest evaluation while it lacks sets that the one before it has."""
    steps = sorted({step for row in rows if isinstance(step := row.get("step"), int)})
    before, newest = (
        {row.get("name") for row in rows if row.get("step") == step} for step in [None, None, *steps][-2:]
    )
    return rows if before <= newest else [row for row in rows if row.get("step") != steps[-1]]


def _compared(rows: Rows, best: BestConfig | None) -> Iterator[tuple[int, float]]:
    """(step, what is compared, less being better) of every step but 0 where that is a finite number."""
    for step in sorted({row["step"] for row in rows if isinstance(row.get("step"), int) and row["step"] > 0}):
        if best is not None:
            value = numbers_of(rows, step, best).get(best.name_and_key[1])
            if value is not None:
                yield step, value if best.less_is_better else -value
            continue
        sets = [row for row in rows if row.get("step") == step and row.get("role") != "task"]
        losses = [_real(row.get("loss")) for row in sets]
        learned = [_real(row.get("loss")) for row in sets if row["role"] == "domain"]
        if losses and None not in losses:
            values = [loss for loss in learned or losses if loss is not None]
            yield step, math.fsum(values) / len(values)


def _retention_limit(config: EvaluateConfig) -> float | None:
    """Nats per token that a retention set of the best step may rise; None: any."""
    limit = config.forgetting
    return limit.loss_rise if limit is not None and limit.policy == "keep_best" else None


def _real(value: Any) -> float | None:
    """A finite number, or None for everything else."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
