"""A line chart over optimizer steps as inline SVG: readable without scripts, colours from the page's CSS."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

Point = tuple[float, float | None]  # (step, value); None is a gap

WIDTH, HEIGHT = 560.0, 270.0
LEFT, RIGHT, TOP, BOTTOM = 58.0, 14.0, 46.0, 30.0  # px around the plot; the top holds the attempts' labels
_LABEL_ROWS = 3
_LABEL_ROW_PX = 13.0
_LABEL_PX_PER_CHARACTER = 5.9
_MAX_POINTS = 1000


@dataclass(frozen=True)
class Series:
    """One line; `color` is a number into the page's palette."""

    name: str
    points: Sequence[Point]
    color: int
    style: str = "line"  # line | faint | dashed
    dots: bool = False


@dataclass(frozen=True)
class Mark:
    """A vertical line where an attempt began; the first attempt has only its label."""

    step: float
    label: str
    line: bool = True


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
) -> str:
    """A <figure> with legend and SVG; `crosses` are (step, text) marked on the axis, `unit` names the values.

    Values that are None or not finite are gaps; on a logarithmic axis so are values that are not positive.
    """
    shown = [Series(s.name, downsample(_drawable(s.points, log)), s.color, s.style, s.dots) for s in series]
    values = [y for s in shown for _, y in s.points if y is not None]
    heading = f"<figcaption>{escape(title)}{f' <small>{escape(unit)}</small>' if unit else ''}</figcaption>"
    if not values:
        return f'<figure class="chart">{heading}<p class="none">no values recorded</p></figure>'
    low, high, ticks = _axis(min(values), max(values), log, from_zero)
    scale = _Scale(x_range, (low, high), log)
    labels, num_rows = _marks(scale, marks)
    top = TOP - 6 - _LABEL_ROW_PX * num_rows  # no empty rows above the plot
    parts = [
        f'<svg viewBox="0 {top:g} {WIDTH:g} {HEIGHT - top:g}" role="img" aria-label="{escape(title)}" '
        f'data-x="{x_range[0]:g} {x_range[1]:g}" data-y="{low!r} {high!r}"{" data-log" if log else ""}>',
        _grid(scale, x_range, ticks),
        labels,
        *(_line(scale, s) for s in shown),
        *(_cross(scale, step, text) for step, text in crosses),
        '<line class="guide" y1="46" y2="240" hidden></line></svg>',
    ]
    return f'<figure class="chart">{heading}{_legend(series)}{"".join(parts)}</figure>'


def downsample(points: Sequence[Point], max_points: int = _MAX_POINTS) -> list[Point]:
    """At most about `max_points` of the points: of each stretch its lowest and its highest, in order.

    Nothing that stands out is lost. Gaps survive only while nothing has to be left out.
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
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        low, high = self.y_range
        share = math.log(value / low) / math.log(high / low) if self.log else (value - low) / (high - low)
        return HEIGHT - BOTTOM - share * (HEIGHT - BOTTOM - TOP)


def _drawable(points: Sequence[Point], log: bool) -> list[Point]:
    def keep(value: float | None) -> bool:
        return value is not None and math.isfinite(value) and abs(value) < 1e300 and (value > 0 or not log)

    return [(x, y if keep(y) else None) for x, y in points]


def _axis(low: float, high: float, log: bool, from_zero: bool) -> tuple[float, float, list[float]]:
    """Axis limits and tick values that take in [low, high]."""
    if log:
        low, high = (low / 1.1, high * 1.1) if high > low else (low / 2, high * 2)
        ticks = _log_ticks(low, high)
        if len(ticks) >= 3:
            return low, high, ticks
        return low, high, [t for t in _linear_ticks(low, high) if low <= t <= high]
    if from_zero:
        low = min(low, 0.0)
    if high <= low:
        margin = abs(low) * 0.1 or 1.0
        low, high = (low if from_zero and low == 0 else low - margin), high + margin
    ticks = _linear_ticks(low, high)
    step = ticks[1] - ticks[0]
    margin = 0.04 * (high - low)
    bottom = max(low - margin, math.floor(low / step) * step)
    top = min(high + margin, math.ceil(high / step) * step)
    return bottom, max(top, high), [t for t in ticks if bottom - 1e-9 * step <= t <= max(top, high) + 1e-9 * step]


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
    every = max(1, decades // 6)
    ticks = [float(f"{f}e{e}") for e in range(first, last + 1, every) for f in factors]
    return [t for t in ticks if low <= t <= high]


def _grid(scale: _Scale, x_range: tuple[float, float], ticks: Sequence[float]) -> str:
    parts = []
    for tick in ticks:
        y = scale.y(tick)
        parts.append(f'<line class="grid" x1="{LEFT:g}" x2="{WIDTH - RIGHT:g}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(
            f'<text class="tick" x="{LEFT - 7:g}" y="{y + 4:.1f}" text-anchor="end">{short_number(tick)}</text>'
        )
    baseline = HEIGHT - BOTTOM
    parts.append(f'<line class="axis" x1="{LEFT:g}" x2="{WIDTH - RIGHT:g}" y1="{baseline:g}" y2="{baseline:g}"/>')
    low, high = x_range
    steps = [t for t in _linear_ticks(low, high, 6) if low <= t <= high and t == int(t)] if high > low else [low]
    for tick in steps:
        x = scale.x(tick)
        anchor = "end" if x > WIDTH - RIGHT - 12 else "middle"
        parts.append(
            f'<text class="tick" x="{x:.1f}" y="{baseline + 17:g}" text-anchor="{anchor}">{short_number(tick)}</text>'
        )
    return "".join(parts)


def _marks(scale: _Scale, marks: Sequence[Mark]) -> tuple[str, int]:
    """Lines with labels in up to three rows above the plot, and how many rows they take.

    A label that fits nowhere stays as the line's tooltip.
    """
    ends = [LEFT - 4.0] * _LABEL_ROWS  # right end of what stands in each row
    parts = []
    for mark in marks:
        x = scale.x(mark.step)
        width = len(mark.label) * _LABEL_PX_PER_CHARACTER + 8
        start = max(min(x + 3, WIDTH - RIGHT - width + 8), LEFT - 4)
        row = next((r for r, end in enumerate(ends) if start >= end), None)
        if mark.line:
            top = TOP if row is None else TOP - 2 - _LABEL_ROW_PX * (row + 1)
            parts.append(
                f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{top:g}" y2="{HEIGHT - BOTTOM:g}">'
                f"<title>{escape(mark.label)}</title></line>"
            )
        if row is not None:
            ends[row] = start + width
            parts.append(
                f'<text class="label" x="{start:.1f}" y="{TOP - 6 - _LABEL_ROW_PX * row:g}">{escape(mark.label)}</text>'
            )
    return "".join(parts), sum(end > LEFT for end in ends)


def _line(scale: _Scale, series: Series) -> str:
    css = f"s {series.style} c{series.color % 8}"
    stretches: list[list[tuple[float, float]]] = [[]]
    for step, value in series.points:
        if value is None:
            stretches.append([])
        else:
            stretches[-1].append((scale.x(step), scale.y(value)))
    parts = []
    for stretch in stretches:
        if len(stretch) > 1:
            points = " ".join(f"{x:.2f},{y:.2f}" for x, y in stretch)
            parts.append(f'<polyline class="{css}" data-name="{escape(series.name)}" points="{points}"/>')
        if series.dots or len(stretch) == 1:
            dot = f'<circle class="{css}" r="3.2" data-name="{escape(series.name)}"'
            parts += [f'{dot} cx="{x:.2f}" cy="{y:.2f}"/>' for x, y in stretch]
    return "".join(parts)


def _cross(scale: _Scale, step: float, text: str) -> str:
    x, y = scale.x(step), HEIGHT - BOTTOM - 7
    return f'<path class="cross" d="M{x - 4:.1f} {y - 4:g}l8 8m0 -8l-8 8"><title>{escape(text)}</title></path>'


def _legend(series: Sequence[Series]) -> str:
    if len(series) < 2:
        return ""
    items = (f'<li class="{s.style} c{s.color % 8}">{escape(s.name)}</li>' for s in series)
    return f'<ul class="legend">{"".join(items)}</ul>'
