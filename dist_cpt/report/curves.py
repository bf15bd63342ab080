"""What changed with the steps: loss, held-out perplexity, learning rates, gradient norm, speed, memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from dist_cpt.report.attempts import Attempt
from dist_cpt.report.chart import Mark, Point, Series, line_chart, smooth
from dist_cpt.report.held_out import by_set, measure
from dist_cpt.report.values import real
from dist_cpt.run_folder.contents import RunFiles

_MAX_CROSSES = 200


def curves(run: RunFiles, attempts: Sequence[Attempt]) -> str:
    """The six charts, with every resume marked in each."""
    steps = [row["step"] for row in [*run.steps, *run.evaluations] if isinstance(row.get("step"), int)]
    if not steps:
        return ""
    x_range = (float(min(0, *steps)) if len(steps) > 1 else float(steps[0]), float(max(steps)))
    marks = [
        Mark(a.first_step, f"#{i} {a.label}", line=i > 0)
        for i, a in enumerate(attempts)
        if x_range[0] <= a.first_step <= x_range[1]
    ]
    common: dict[str, Any] = {"x_range": x_range, "marks": marks}
    loss = points_of(run.steps, "loss")
    half_width = max(2, len(loss) // 60)
    norms = points_of(run.steps, "grad_norm")
    skipped = [(row["step"], f"step {row['step']} skipped") for row in run.steps if row.get("skipped") is True]
    charts = [
        line_chart(
            "Training loss",
            [
                Series("each step", loss, 0, "faint"),
                Series(f"mean over ±{half_width} steps", smooth(loss, half_width), 0),
            ]
            if len(loss) > 3
            else [Series("each step", loss, 0)],
            unit="nats per token",
            **common,
        ),
        _perplexity_chart(run, common),
        line_chart("Learning rate", _lr_series(run.steps), from_zero=True, **common),
        line_chart(
            "Gradient norm" + (f", {len(skipped)} skipped ✕" if skipped else ""),
            [Series("before clipping", norms, 2)],
            log=_spread(norms) > 30,
            from_zero=True,
            crosses=skipped[:_MAX_CROSSES],
            **common,
        ),
        line_chart(
            "Speed",
            [Series("tokens/s", points_of(run.steps, "tokens_per_second"), 4)],
            unit="tokens/s, all ranks",
            from_zero=True,
            **common,
        ),
        line_chart(
            "Memory",
            [Series("GiB", points_of(run.steps, "memory_gib"), 5)],
            unit="GiB, peak of rank 0",
            from_zero=True,
            **common,
        ),
    ]
    note = "x: optimizer step. Dashed lines: resumes, each with its engine and number of ranks."
    return f'<h2>Training</h2><p class="soft">{note}</p><div class="charts">{"".join(charts)}</div>'


def _perplexity_chart(run: RunFiles, common: dict[str, Any]) -> str:
    sets = by_set(run)
    key = measure(next(iter(sets.values()), []))
    series = [
        Series(name, points_of(rows, key), index, "dashed" if role == "retention" else "line", dots=True)
        for index, ((name, role), rows) in enumerate(sets.items())
    ]
    spread = _spread([point for s in series for point in s.points])
    unit = "dashed: retention" if any(s.style == "dashed" for s in series) else ""
    return line_chart(f"Held-out {key}", series, unit=unit, log=key == "perplexity" and spread > 4, **common)


def _lr_series(steps: Sequence[dict[str, Any]]) -> list[Series]:
    groups = dict.fromkeys(g for row in steps for g in (row.get("lr") if isinstance(row.get("lr"), dict) else {}) or {})
    return [
        Series(
            str(group),
            [(row["step"], real(lr.get(group))) for row in steps if isinstance(lr := row.get("lr"), dict)],
            i,
        )
        for i, group in enumerate(groups)
    ]


def points_of(rows: Iterable[dict[str, Any]], key: str) -> list[Point]:
    """(step, value) of one key over rows; None where it is absent or no finite number."""
    return [(row["step"], real(row.get(key))) for row in rows if isinstance(row.get("step"), int)]


def _spread(points: Sequence[Point]) -> float:
    """Largest over smallest value; 1 unless all are positive."""
    values = [y for _, y in points if y is not None]
    return max(values) / min(values) if values and min(values) > 0 else 1.0
