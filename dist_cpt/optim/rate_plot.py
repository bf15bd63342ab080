"""The learning rates of a recipe as plain characters, before anything is trained."""

from __future__ import annotations

from dist_cpt.config.exclusions import num_steps
from dist_cpt.config.schema import RunConfig
from dist_cpt.errors import ConfigError
from dist_cpt.optim.schedule import rates_at

HEIGHT = 8
_LABEL = 10  # columns of a rate and its bar


def rate_plot(config: RunConfig, width: int = 70) -> list[str]:
    """A chart for each group of a resolved recipe, over its optimizer steps; ASCII lines of at most `width` + 10."""
    total = num_steps(config)
    if total == 0:
        raise ConfigError(
            f"train.epochs: {config.train.epochs:g} are steps only once the data is prepared",
            remedy="plot it with a guess: --set train.epochs=null --set train.tokens=N",
        )
    columns = min(width, total)
    steps = [1 + round(column * (total - 1) / max(columns - 1, 1)) for column in range(columns)]
    rates = [rates_at(config, step) for step in steps]
    lines = [f"{total:,} steps of {config.batch.global_tokens:,} tokens; learning rates by group"]
    for group in rates[0]:
        lines += ["", *_chart(group, [at[group] for at in rates], config), _axis(total, columns)]
    return lines


def _chart(group: str, values: list[float], config: RunConfig) -> list[str]:
    """The values as columns of `*`, each at its height above 0."""
    peak = max(values) or 1.0
    heights = [round(value / peak * (HEIGHT - 1)) for value in values]
    first, last = (rates_at(config, step)[group] for step in (1, num_steps(config)))
    lines = [f"{group}: step 1 {first:.2e}, highest {max(values):.2e}, last step {last:.2e}"]
    for row in reversed(range(HEIGHT)):
        label = {HEIGHT - 1: f"{peak:.2e}", 0: "0"}.get(row, "")
        marks = "".join("*" if height == row else " " for height in heights)
        lines.append(f"{label:>{_LABEL - 1}}|{marks}".rstrip())
    return lines


def _axis(total: int, columns: int) -> str:
    return " " * _LABEL + f"1{total:>{max(columns - 1, 1)},}"
