"""Numbers and times of a run as a person reads them, and wrong types as absent ones."""

from __future__ import annotations

import math
from typing import Any


def number(value: Any) -> str:
    """A number for people: four significant digits, thousands apart; 'not recorded' if absent."""
    if isinstance(value, bool) or value is None:
        return "not recorded"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        if value == 0 or 1e-3 <= abs(value) < 1e6:
            return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"
        return f"{value:.3g}"
    return str(value)


def large(value: Any) -> str:
    """A count that may be huge: 1,560,000, then 52 B."""
    amount = real(value)
    return number(value) if amount is None or amount < 1e9 else f"{amount / 1e9:,.4g} B"


def real(value: Any) -> float | None:
    """A finite float, or None for everything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def integer(value: Any, otherwise: int) -> int:
    """An int, or `otherwise` for everything else."""
    return value if isinstance(value, int) and not isinstance(value, bool) else otherwise


def items(value: Any) -> list[Any]:
    """A list, or an empty one for everything else."""
    return value if isinstance(value, list) else []


def relative_change(before: Any, after: Any) -> tuple[str, str]:
    """Relative change of a perplexity as text, and its CSS class: down is good."""
    first, last = real(before), real(after)
    if first is None or last is None or first <= 0:
        return "not comparable", "warn"
    change = last / first - 1
    css = "good" if change <= 0 else "bad" if change > 0.02 else "warn"
    return f"{change:+.1%}".replace("-", "−"), css


def duration(seconds: float) -> str:
    """Seconds in the two largest fitting units."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"


def clock(text: str) -> str:
    """Date and time to the second, without the T."""
    return text[:19].replace("T", " ")
