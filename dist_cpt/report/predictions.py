"""What the plan predicted beside what the run measured, from plan.json."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dist_cpt.report.values import mapping, number, real


@dataclass(frozen=True)
class Prediction:
    """One quantity."""

    what: str
    predicted: str
    measured: str
    ratio: str  # measured over predicted


def predictions(plan: dict[str, Any]) -> list[Prediction]:
    """Speed and memory by part; none without a prediction and a measurement."""
    predicted, measured = mapping(plan.get("predicted")), mapping(plan.get("measured"))
    if not predicted or not measured.get("steps"):
        return []
    memory, state = mapping(predicted.get("memory_bytes")), mapping(measured.get("state_bytes"))
    rows = [
        _row("tokens/s", predicted.get("tokens_per_second"), measured.get("tokens_per_second"), 1.0),
        _row("seconds per step", predicted.get("step_seconds"), measured.get("step_seconds"), 1.0),
        *(_row(f"{part}, MiB", memory.get(part), state.get(part), 2.0**20) for part in state),
    ]
    loading = max(real(memory.get("total")) or 0.0, real(predicted.get("loading_bytes")) or 0.0)
    rows.append(_row("peak memory, MiB", loading or None, measured.get("peak_bytes"), 2.0**20))
    return [row for row in rows if row is not None]


def _row(what: str, predicted: Any, measured: Any, unit: float) -> Prediction | None:
    left, right = real(predicted), real(measured)
    if left is None or right is None:
        return None
    ratio = f"{right / left:.2f}" if left > 0 else ""
    return Prediction(what, number(left / unit), number(right / unit), ratio)
