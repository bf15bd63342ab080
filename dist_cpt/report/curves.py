"""The charts over the steps: loss, held-out scores, learning rates, gradient norm, speed, memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

from dist_cpt.report.attempts import Attempt
from dist_cpt.report.chart import Chart, Mark, Point, Series, line_chart, smooth
from dist_cpt.report.held_out import HeldOutSet
from dist_cpt.report.values import real
from dist_cpt.run_folder.contents import RunFiles

HELD_OUT = "Held-out"  # how the title of the chart of what was learned begins
_MAX_CROSSES = 200


def curves(run: RunFiles, attempts: Sequence[Attempt], held_out: Sequence[HeldOutSet]) -> list[Chart]:
    """One chart of each quantity that was recorded, with every resume marked in each."""
    x_range = steps_of(run)
    if x_range is None:
        return []
    marks = [
        Mark(attempt.first_step, f"#{i} {attempt.label}", line=i > 0)
        for i, attempt in enumerate(attempts)
        if x_range[0] <= attempt.first_step <= x_range[1]
    ]
    chart = partial(line_chart, x_range=x_range, marks=marks)
    scores = [
        Series(s.name, points_of(s.rows, s.measure), i, "dashed" if s.role == "retention" else "line", dots=True)
        for i, s in enumerate(held_out)
        if s.role != "task"
    ]
    tasks = [
        Series(s.name, points_of(s.rows, s.measure), i, dots=True) for i, s in enumerate(held_out) if s.role == "task"
    ]
    measure = held_out[0].measure if held_out else "perplexity"
    norms = points_of(run.steps, "grad_norm")
    skipped = [(row["step"], f"step {row['step']} skipped") for row in run.steps if row.get("skipped") is True]
    speed = [Series("tokens/s", points_of(run.steps, "tokens_per_second"), 4)]
    memory = [Series("peak of rank 0", points_of(run.steps, "memory_gib"), 5), *_memory_parts(run.steps)]
    drawn = [
        chart("Training loss", _loss_series(run.steps), unit="nats per token"),
        chart(
            f"{HELD_OUT} {measure}",
            scores,
            unit="dashed: retention" if any(s.style == "dashed" for s in scores) else "",
            log=measure == "perplexity" and _spread([point for s in scores for point in s.points]) > 4,
        ),
        chart("Tasks", tasks, from_zero=True),
        chart("Learning rate", _lr_series(run.steps), from_zero=True),
        chart(
            "Gradient norm" + (f", {len(skipped)} skipped ✕" if skipped else ""),
            [Series("before clipping", norms, 2)],
            log=_spread(norms) > 30,
            from_zero=True,
            crosses=skipped[:_MAX_CROSSES],
        ),
        chart("Speed", speed, unit="tokens/s, all ranks", from_zero=True),
        chart("MFU", [Series("MFU", points_of(run.steps, "mfu"), 6)], unit="of the device's peak", from_zero=True),
        chart("Memory", memory, unit="GiB, rank 0", from_zero=True),
        chart("Busiest expert", _expert_series(run.steps), unit="its tokens over the layer's mean", from_zero=True),
    ]
    return [one for one in drawn if one.drawing is not None]


def steps_of(run: RunFiles) -> tuple[float, float] | None:
    """The first and the last step of a run's rows; None without any."""
    steps = [row["step"] for row in [*run.steps, *run.evaluations] if isinstance(row.get("step"), int)]
    if not steps:
        return None
    return float(min(0, *steps)) if len(steps) > 1 else float(steps[0]), float(max(steps))


def _memory_parts(steps: Sequence[dict[str, Any]]) -> list[Series]:
    """Bytes by part as GiB, where rows have them."""
    rows = [(row["step"], row["memory_bytes"]) for row in steps if _has_parts(row)]
    parts = dict.fromkeys(part for _, sizes in rows for part in sizes)
    return [
        Series(str(part), [(step, _gib(sizes.get(part))) for step, sizes in rows], number, "dashed")
        for number, part in enumerate(parts)
    ]


def _expert_series(steps: Sequence[dict[str, Any]]) -> list[Series]:
    """The load of the busiest expert, in the layer where it is highest and on average, where rows have it."""
    rows = [(row["step"], row["experts"]["load"]) for row in steps if _has_load(row)]
    highest = [(step, real(max(load))) for step, load in rows]
    mean = [(step, real(sum(load) / len(load))) for step, load in rows]
    return [Series("highest layer", highest, 3), Series("mean over layers", mean, 4)] if rows else []


def _has_load(row: dict[str, Any]) -> bool:
    load = experts.get("load") if isinstance(experts := row.get("experts"), dict) else None
    numbers = isinstance(load, list) and load and all(real(value) is not None for value in load)
    return isinstance(row.get("step"), int) and bool(numbers)


def _has_parts(row: dict[str, Any]) -> bool:
    return isinstance(row.get("step"), int) and isinstance(row.get("memory_bytes"), dict)


def _gib(value: Any) -> float | None:
    size = real(value)
    return None if size is None else size / 2**30


def _loss_series(steps: Sequence[dict[str, Any]]) -> list[Series]:
    loss = points_of(steps, "loss")
    if len(loss) <= 3:
        return [Series("each step", loss, 0)]
    half_width = max(2, len(loss) // 60)
    mean = Series(f"mean over ±{half_width} steps", smooth(loss, half_width), 0)
    return [Series("each step", loss, 0, "faint"), mean]


def _lr_series(steps: Sequence[dict[str, Any]]) -> list[Series]:
    rows = [(r["step"], r["lr"]) for r in steps if isinstance(r.get("step"), int) and isinstance(r.get("lr"), dict)]
    groups = dict.fromkeys(group for _, rates in rows for group in rates)
    return [Series(str(g), [(step, real(rates.get(g))) for step, rates in rows], i) for i, g in enumerate(groups)]


def points_of(rows: Iterable[dict[str, Any]], key: str) -> list[Point]:
    """(step, value) of one key over rows; None where it is absent or not a finite number."""
    return [(row["step"], real(row.get(key))) for row in rows if isinstance(row.get("step"), int)]


def _spread(points: Sequence[Point]) -> float:
    """Largest over smallest value; 1 unless all are positive."""
    values = [y for _, y in points if y is not None]
    return max(values) / min(values) if values and min(values) > 0 else 1.0
