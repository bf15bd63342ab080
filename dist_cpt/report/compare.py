"""Several runs on one page: what each learned and forgot, their curves, and where two of the same seed diverge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from dist_cpt.errors import ConfigError
from dist_cpt.report.attempts import Attempt, read_attempts
from dist_cpt.report.chart import Chart, Series, line_chart, smooth
from dist_cpt.report.curves import points_of, steps_of
from dist_cpt.report.gauge import gauge
from dist_cpt.report.goodput import goodput_of
from dist_cpt.report.held_out import HeldOutSet, held_out_sets
from dist_cpt.report.report import name_of, render, status_of
from dist_cpt.report.values import number, percent, real
from dist_cpt.run_folder.contents import RunFiles, read_run


@dataclass(frozen=True)
class Compared:
    """One of the runs."""

    name: str  # unique among them
    run: RunFiles
    attempts: list[Attempt]
    held_out: list[HeldOutSet]
    color: int

    @property
    def style(self) -> str:
        """Later runs are dashed, so that both of two equal lines show."""
        return "dashed" if self.color else "line"

    @property
    def status(self) -> dict[str, str]:
        return status_of(self.run, self.attempts)

    @property
    def engines(self) -> str:
        return ", then ".join(dict.fromkeys(attempt.label for attempt in self.attempts))

    @property
    def tokens_per_second(self) -> str:
        speeds = [speed for _, speed in points_of(self.run.steps, "tokens_per_second") if speed is not None]
        return number(round(median(speeds))) if speeds else ""

    @property
    def peak_memory(self) -> str:
        sizes = [size for _, size in points_of(self.run.steps, "memory_gib") if size is not None]
        return f"{max(sizes):.4g} GiB" if sizes else ""

    @property
    def goodput(self) -> str:
        found = goodput_of(self.run)
        return percent(found.fraction) if found is not None and found.wall else ""

    @property
    def last(self) -> dict[str, Any]:
        return self.run.steps[-1] if self.run.steps else {}


@dataclass(frozen=True)
class Difference:
    """How far a run's training loss is from the first one's, over the steps that both have."""

    name: str
    steps: int
    largest: str
    at_step: int
    first_step: int | None  # at which they differ; None: nowhere


def comparison_html(folders: Sequence[Path], *, refresh_seconds: int | None = None) -> str:
    """The page as text.

    Raises:
        ConfigError: fewer than two runs.
    """
    if len(folders) < 2:
        raise ConfigError("a comparison needs two runs or more")
    runs = _runs(folders)
    return render(
        "compare.html",
        refresh_seconds,
        runs=runs,
        sets=_sets(runs),
        gauge=gauge([(one.name, one.held_out) for one in runs]),
        charts=_charts(runs),
        differences=_differences(runs),
        settings=_settings(runs),
    )


def _runs(folders: Sequence[Path]) -> list[Compared]:
    read = [read_run(folder) for folder in folders]
    names = [name_of(run) for run in read]
    shown = [
        name if names.count(name) == 1 else f"{name} ({run.folder.absolute().parent.name}/{run.folder.absolute().name})"
        for name, run in zip(names, read, strict=True)
    ]
    shown = [name if shown.count(name) == 1 else f"{number}: {name}" for number, name in enumerate(shown, 1)]
    return [
        Compared(name, run, read_attempts(run), held_out_sets(run), color)
        for color, (name, run) in enumerate(zip(shown, read, strict=True))
    ]


def _sets(runs: Sequence[Compared]) -> list[tuple[str, str, list[HeldOutSet | None]]]:
    """(name, role, of each run) for every held-out set of any of them."""
    keys = dict.fromkeys((one.name, one.role) for run in runs for one in run.held_out)
    found = [{(one.name, one.role): one for one in run.held_out} for run in runs]
    return [(name, role, [of_run.get((name, role)) for of_run in found]) for name, role in keys]


def _charts(runs: Sequence[Compared]) -> list[Chart]:
    ranges = [found for one in runs if (found := steps_of(one.run)) is not None]
    if not ranges:
        return []
    x_range = (min(low for low, _ in ranges), max(high for _, high in ranges))

    def of_rows(key: str) -> list[Series]:
        return [Series(one.name, points_of(one.run.steps, key), one.color, one.style) for one in runs]

    losses = [
        Series(one.name, smooth(points, max(2, len(points) // 60)) if len(points) > 3 else points, one.color, one.style)
        for one in runs
        for points in [points_of(one.run.steps, "loss")]
    ]
    apart = [Series(one.name, _apart(runs[0], one), one.color) for one in runs[1:]]
    drawn = [
        line_chart("Training loss", losses, x_range=x_range, unit="nats per token, mean over neighbouring steps"),
        line_chart(f"Training loss, less that of {runs[0].name}", apart, x_range=x_range, unit="nats, step by step"),
    ]
    for name, role, sets in _sets(runs):
        series = [
            Series(one.name, points_of(found.rows, found.measure), one.color, one.style, dots=True)
            for one, found in zip(runs, sets, strict=True)
            if found is not None
        ]
        measure = next(found.measure for found in sets if found is not None)
        drawn.append(line_chart(f"Held-out {measure} of {name}", series, x_range=x_range, unit=role))
    drawn += [
        line_chart("Gradient norm", of_rows("grad_norm"), x_range=x_range, from_zero=True),
        line_chart("Speed", of_rows("tokens_per_second"), x_range=x_range, unit="tokens/s", from_zero=True),
        line_chart("Memory", of_rows("memory_gib"), x_range=x_range, unit="GiB, peak of rank 0", from_zero=True),
    ]
    return [chart for chart in drawn if chart.drawing is not None]


def _apart(first: Compared, other: Compared) -> list[tuple[float, float | None]]:
    mine = dict(points_of(first.run.steps, "loss"))
    pairs = [(step, loss, mine.get(step)) for step, loss in points_of(other.run.steps, "loss") if step in mine]
    return [(step, None if loss is None or base is None else loss - base) for step, loss, base in pairs]


def _differences(runs: Sequence[Compared]) -> list[Difference]:
    found = []
    for one in runs[1:]:
        apart = [(step, abs(value)) for step, value in _apart(runs[0], one) if value is not None]
        if apart:
            step, largest = max(apart, key=lambda item: item[1])
            first = next((int(step) for step, value in apart if value), None)
            found.append(Difference(one.name, len(apart), number(largest), int(step), first))
    return found


def _settings(runs: Sequence[Compared]) -> list[tuple[str, list[str]]]:
    """Every setting in which the recipes differ."""
    flat = [_flat(one.run.recipe) for one in runs]
    keys = dict.fromkeys(key for recipe in flat for key in recipe)
    shown = [(key, [recipe.get(key, "") for recipe in flat]) for key in keys]
    return [(key, texts) for key, texts in shown if len(set(texts)) > 1]


def _flat(value: Any, prefix: str = "") -> dict[str, str]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if items is None:
        exact = real(value)
        return {prefix: str(value) if exact is None else f"{exact:g}"}
    return {
        name: text
        for key, child in items
        for name, text in _flat(child, f"{prefix}.{key}" if prefix else str(key)).items()
    }
