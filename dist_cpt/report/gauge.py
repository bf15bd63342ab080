"""What was gained on the new text against what was lost on the old, as one picture."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from dist_cpt.report.chart import Chart, Series, path_chart
from dist_cpt.report.held_out import HeldOutSet
from dist_cpt.report.values import number, real

Reading = tuple[int, float, float]  # step, mean loss rise on retention sets, mean gain on domain sets


def readings(held_out: Sequence[HeldOutSet]) -> list[Reading]:
    """At every step at which sets of both roles were evaluated, over the base, or else over the first evaluation."""
    rises: dict[str, dict[int, list[float]]] = {"domain": {}, "retention": {}}
    for one in held_out:
        base = one.base_loss
        for row in one.rows:
            loss = real(row.get("loss"))
            if base is not None and loss is not None and one.role in rises:
                rises[one.role].setdefault(row["step"], []).append(loss - base)
    both = sorted(rises["domain"].keys() & rises["retention"].keys())
    return [(step, fmean(rises["retention"][step]), -fmean(rises["domain"][step])) for step in both]


def gauge(runs: Sequence[tuple[str, Sequence[HeldOutSet]]]) -> Chart | None:
    """The path of each run, from its first evaluation on; None where fewer than two points can be drawn."""
    paths = [(name, readings(held_out)) for name, held_out in runs]
    drawn = [(name, path) for name, path in paths if len(path) > 1]
    if not drawn:
        return None
    series = [
        Series(
            name,
            [(rise, gain) for _, rise, gain in path],
            index,
            "dashed" if index else "line",
            dots=True,
            labels=[f"step {step:,}" for step, _, _ in path],
        )
        for index, (name, path) in enumerate(drawn)
    ]
    lost = [rise for _, path in drawn for _, rise, _ in path]
    margin = 0.05 * (max(*lost, 0.0) - min(*lost, 0.0)) or 0.01
    return path_chart(
        "Forgetting gauge",
        series,
        x_range=(min(*lost, 0.0) - margin, max(*lost, 0.0) + margin),
        x_name="loss on the old",
        unit="gain on the new text (up) against loss on the old (right), nats per token",
    )


def summary(held_out: Sequence[HeldOutSet]) -> str:
    """`gained 0.81, lost 0.02 nats per token`; empty if unknown."""
    path = readings(held_out)
    if not path:
        return ""
    _, rise, gain = path[-1]
    old = f"{'lost' if rise > 0 else 'gained'} {number(abs(rise))} on the old"
    return f"{'gained' if gain > 0 else 'lost'} {number(abs(gain))} nats per token on the new text, {old}"
