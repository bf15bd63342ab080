"""What was learned and what was forgotten, from the held-out sets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dist_cpt.report.values import clock, number, real
from dist_cpt.run_folder.contents import RunFiles


@dataclass(frozen=True)
class HeldOutSet:
    """The evaluations of one held-out set, or of a task (`role` "task"), in the order of the steps."""

    name: str
    role: str
    rows: list[dict[str, Any]]

    @property
    def measure(self) -> str:
        """The score that is compared: accuracy for classes, lm-eval's first for a task, else perplexity."""
        if self.role == "task":
            return next((key for key in self.rows[0] if "," in key), "")
        return "accuracy" if "accuracy" in self.rows[0] else "perplexity"

    @property
    def first(self) -> Any:
        return self.rows[0].get(self.measure)

    @property
    def last(self) -> Any:
        return self.rows[-1].get(self.measure)

    @property
    def base_loss(self) -> float | None:
        """Under the base, where it was computed; else that of the first evaluation, at step 0 the base too."""
        known = [value for row in self.rows if (value := real(row.get("base_loss"))) is not None]
        return known[-1] if known else real(self.rows[0].get("loss"))

    @property
    def rise(self) -> float | None:
        """Of the last loss over that of the base, nats per token."""
        last = real(self.rows[-1].get("loss"))
        return None if last is None or self.base_loss is None else last - self.base_loss

    @property
    def by_position(self) -> list[tuple[Any, Any, Any, Any]]:
        """(first position, loss before, loss after, targets) of each range of positions that both evaluations have."""
        first, last = (_ranges(row.get("loss_by_position")) for row in (self.rows[0], self.rows[-1]))
        before = {start: loss for start, loss, _ in first}
        return [(start, before[start], loss, targets) for start, loss, targets in last if start in before]

    @property
    def spread(self) -> str:
        """`4.963 to 11.59`, the values of all evaluations."""
        values = [value for row in self.rows if (value := real(row.get(self.measure))) is not None]
        return f"{number(min(values))} to {number(max(values))} ({len(self.rows)} evaluations)" if values else ""

    @property
    def change(self) -> tuple[str, str]:
        """The change from the first to the last evaluation, and its CSS class."""
        first, last = real(self.first), real(self.last)
        if len(self.rows) == 1:
            return "", ""
        if self.measure != "perplexity":
            if first is None or last is None:
                return "", ""
            points = 100 * (last - first)
            return f"{points:+.1f} points", "good" if points > 0 else "bad" if points < 0 else ""
        if first is None or last is None or first <= 0:
            return "not comparable", "warn"
        change = last / first - 1
        css = "good" if change <= 0 else "bad" if change > 0.02 else "warn"
        return f"{change:+.1%}".replace("-", "−"), css


def measured_later(run: RunFiles) -> list[tuple[str, Any, str, str]]:
    """(time, step, set or task, its numbers) of every row of `dist-cpt evaluate`."""
    return [
        (
            clock(row.get("time")),
            row.get("step"),
            str(row.get("task") or row.get("name") or ""),
            ", ".join(f"{key} {number(value)}" for key, value in row.items() if isinstance(value, float)),
        )
        for row in run.evaluated
    ]


def _ranges(value: Any) -> list[list[Any]]:
    """What a row says of positions, as far as it is in order."""
    rows = value if isinstance(value, list) else []
    return [row for row in rows if isinstance(row, list) and len(row) == 3 and isinstance(row[0], int)]


def held_out_sets(run: RunFiles) -> list[HeldOutSet]:
    """One per (name, role), in the order of their first evaluation."""
    sets: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in run.evaluations:
        if isinstance(row.get("step"), int):
            sets.setdefault((str(row.get("name")), str(row.get("role", "domain"))), []).append(row)
    return [HeldOutSet(*key, sorted(rows, key=lambda row: row["step"])) for key, rows in sets.items()]
