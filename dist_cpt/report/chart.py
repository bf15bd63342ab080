"""The geometry of a line chart over optimizer steps; `templates/chart.html` draws it as inline SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

Point = tuple[float, float | None]  # (step, value); None is a gap

STEP = "step"  # the x axis of most charts
_LABEL_ROWS = 3
_LABEL_ROW_PX = 13.0
_LABEL_PX_PER_CHARACTER = 5.9
_MAX_POINTS = 1000


@dataclass(frozen=True)
class Plot:
    """The view box and the plot inside it, px; the attempts' labels are above the plot."""

    width: float = 560.0
    height: float = 270.0
    left: float = 58.0
    right: float = 546.0
    top: float = 46.0
    bottom: float = 240.0


PLOT = Plot()


@dataclass(frozen=True)
class Series:
    """One line; `color` is an index into the page's palette."""

    name: str
    points: Sequence[Point]
    color: int
    style: str = "line"  # line | faint | dashed
    dots: bool = False
    labels: Sequence[str] = ()  # of the points, shown with the values; for charts over something else than steps

    @property
    def css(self) -> str:
        return f"{self.style} c{self.color % 8}"


@dataclass(frozen=True)
class Mark:
    """A vertical line where an attempt began; the first attempt has only its label."""

    step: float
    label: str
    line: bool = True


@dataclass(frozen=True)
class PlacedMark:
    """A mark in px. A label for which there is no room has no `label_y` and is the line's tooltip only."""

    label: str
    line: bool
    x: float
    top: float
    label_x: float
    label_y: float | None


@dataclass(frozen=True)
class Drawing:
    """Everything that is drawn, in px; the ranges are in steps and values."""

    plot: Plot
    top: float  # of the view box: no empty label rows above the plot
    x_range: tuple[float, float]
    y_range: tuple[float, float]
    log: bool
    x_name: str
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    marks: list[PlacedMark]
    lines: list[tuple[Series, list[tuple[float, float]]]]  # consecutive points without a gap
    crosses: list[tuple[float, str]]


@dataclass(frozen=True)
class Chart:
    """A chart with its caption; `drawing` is None without a value to draw."""

    title: str
    unit: str
    legend: Sequence[Series]
    drawing: Drawing | None


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    x_range: tuple[float, float],
    marks: Sequence[Mark] = (),
    crosses: Sequence[tuple[float, str]] = (),
    unit: str = "",
    log: bool = False,
    from_zero: bool = False,
) -> Chart:
    """Lay out a chart; `crosses` are (step, text) marked on the axis, `unit` is the unit of the values.

    Values that are None or not finite are gaps, and on a logarithmic axis values that are not positive.
    """
    drawn = [replace(s, points=downsample(_drawable(s.points, log))) for s in series]
    drawing = _lay_out(drawn, x_range, marks, crosses, log=log, from_zero=from_zero, x_name=STEP)
    return Chart(title, unit, series, drawing)


def path_chart(
    title: str, series: Sequence[Series], *, x_range: tuple[float, float], x_name: str, unit: str = ""
) -> Chart:
    """Lay out a chart of two quantities; the points of a path are in any order."""
    return Chart(title, unit, series, _lay_out(series, x_range, (), (), log=False, from_zero=True, x_name=x_name))


def _lay_out(
    drawn: Sequence[Series],
    x_range: tuple[float, float],
    marks: Sequence[Mark],
    crosses: Sequence[tuple[float, str]],
    *,
    log: bool,
    from_zero: bool,
    x_name: str,
) -> Drawing | None:
    values = [y for s in drawn for _, y in s.points if y is not None]
    if not values:
        return None
    low, high, y_ticks = _y_axis(min(values), max(values), log, from_zero)
    scale = _Scale(x_range, (low, high), log)
    placed, num_rows = _place_marks(scale, marks)
    return Drawing(
        plot=PLOT,
        top=PLOT.top - 6 - _LABEL_ROW_PX * num_rows,
        x_range=x_range,
        y_range=(low, high),
        log=log,
        x_name=x_name,
        x_ticks=[(scale.x(x), short_number(x)) for x in _x_ticks(*x_range, whole=x_name == STEP)],
        y_ticks=[(scale.y(value), short_number(value)) for value in y_ticks],
        marks=placed,
        lines=[(s, points) for s in drawn for points in _without_gaps(scale, s.points)],
        crosses=[(scale.x(step), text) for step, text in crosses],
    )


def downsample(points: Sequence[Point], max_points: int = _MAX_POINTS) -> list[Point]:
    """At most about `max_points` of the points: the lowest and the highest of each bucket, in order.

    Every extreme is kept. Gaps survive only where nothing has to be dropped.
    """
    if len(points) <= max_points:
        return list(points)
    solid = [(x, y) for x, y in points if y is not None]
    buckets = max_points // 2 - 1
    kept: set[int] = {0, len(solid) - 1}
    for bucket in range(buckets):
        start, stop = bucket * len(solid) // buckets, (bucket + 1) * len(solid) // buckets
        if start < stop:
            kept.add(min(range(start, stop), key=lambda i: solid[i][1]))
            kept.add(max(range(start, stop), key=lambda i: solid[i][1]))
    return [solid[i] for i in sorted(kept) if 0 <= i < len(solid)]


def smooth(points: Sequence[Point], half_width: int) -> list[Point]:
    """Centred mean over 2 * half_width + 1 points, narrower (but still centred) towards both ends."""
    solid = [(x, y) for x, y in points if y is not None and math.isfinite(y)]
    sums = [0.0]
    for _, y in solid:
        sums.append(sums[-1] + y)
    result: list[Point] = []
    for i, (x, _) in enumerate(solid):
        reach = min(half_width, i, len(solid) - 1 - i)
        result.append((x, (sums[i + reach + 1] - sums[i - reach]) / (2 * reach + 1)))
    return result


def short_number(value: float) -> str:
    """At most about six characters: 950, 12.5k, 3.2M, 1e-05."""
    magnitude = abs(value)
    if magnitude == 0:
        return "0"
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if magnitude >= size * (0.9995 if unit != "k" else 9.995):
            return f"{value / size:.4g}{unit}"
    if magnitude < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.4g}"


@dataclass(frozen=True)
class _Scale:
    x_range: tuple[float, float]
    y_range: tuple[float, float]
    log: bool

    def x(self, step: float) -> float:
        low, high = self.x_range
        share = (step - low) / (high - low) if high > low else 0.5
        return PLOT.left + share * (PLOT.right - PLOT.left)

    def y(self, value: float) -> float:
        low, high = self.y_range
        share = math.log(value / low) / math.log(high / low) if self.log else (value - low) / (high - low)
        return PLOT.bottom - share * (PLOT.bottom - PLOT.top)


def _drawable(points: Sequence[Point], log: bool) -> list[Point]:
    def is_drawable(value: float | None) -> bool:
        return value is not None and math.isfinite(value) and abs(value) < 1e300 and (value > 0 or not log)

    return [(x, y if is_drawable(y) else None) for x, y in points]


def _without_gaps(scale: _Scale, points: Sequence[Point]) -> list[list[tuple[float, float]]]:
    lines: list[list[tuple[float, float]]] = [[]]
    for step, value in points:
        if value is None:
            lines.append([])
        else:
            lines[-1].append((scale.x(step), scale.y(value)))
    return lines


def _y_axis(low: float, high: float, log: bool, from_zero: bool) -> tuple[float, float, list[float]]:
    """Axis limits that include [low, high], and tick values."""
    if log:
        low, high = (low / 1.1, high * 1.1) if high > low else (low / 2, high * 2)
        ticks = _log_ticks(low, high)
        if len(ticks) < 3:
            ticks = [t for t in _linear_ticks(low, high) if low <= t <= high]
        return low, high, ticks
    if from_zero:
        low = min(low, 0.0)
    if high <= low:
        margin = abs(low) * 0.1 or 1.0
        low, high = (low if from_zero and low == 0 else low - margin), high + margin
    ticks = _linear_ticks(low, high)
    step = ticks[1] - ticks[0]
    margin = 0.04 * (high - low)
    bottom = max(low - margin, math.floor(low / step) * step)
    top = max(min(high + margin, math.ceil(high / step) * step), high)
    return bottom, top, [t for t in ticks if bottom - 1e-9 * step <= t <= top + 1e-9 * step]


def _x_ticks(low: float, high: float, *, whole: bool) -> list[float]:
    """`whole` numbers for steps."""
    if high <= low:
        return [low]
    return [t for t in _linear_ticks(low, high, 6) if low <= t <= high and (not whole or t == int(t))]


def _linear_ticks(low: float, high: float, about: int = 5) -> list[float]:
    raw = (high - low) / about
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= raw * 0.999)
    first = math.floor(low / step)
    return [round(i * step, 12 - math.floor(math.log10(step))) for i in range(first, math.ceil(high / step) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    decades = last - first
    factors = (1, 2, 5) if decades <= 3 else (1,)
    ticks = [float(f"{f}e{e}") for e in range(first, last + 1, max(1, decades // 6)) for f in factors]
    return [t for t in ticks if low <= t <= high]


def _place_marks(scale: _Scale, marks: Sequence[Mark]) -> tuple[list[PlacedMark], int]:
    """Marks with their labels in up to three rows above the plot, and the number of rows in use."""
    ends = [PLOT.left - 4.0] * _LABEL_ROWS  # right end of the last label of each row
    placed = []
    for mark in marks:
        x = scale.x(mark.step)
        width = len(mark.label) * _LABEL_PX_PER_CHARACTER + 8
        start = max(min(x + 3, PLOT.right - width + 8), PLOT.left - 4)
        row = next((r for r, end in enumerate(ends) if start >= end), None)
        if row is None:
            placed.append(PlacedMark(mark.label, mark.line, x, PLOT.top, start, None))
        else:
            ends[row] = start + width
            above = PLOT.top - _LABEL_ROW_PX * row
            placed.append(PlacedMark(mark.label, mark.line, x, above - 2 - _LABEL_ROW_PX, start, above - 6))
    return placed, sum(end > PLOT.left for end in ends)
