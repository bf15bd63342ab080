"""Numbers and times of a run as a person reads them; values of a wrong type count as absent."""

from __future__ import annotations

import math
from datetime import datetime
from typing import Any


def number(value: Any) -> str:
    """A number with four significant digits and thousands separators; 'not recorded' if absent."""
    if isinstance(value, bool) or value is None:
        return "not recorded"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        if value == 0 or 1e-3 <= abs(value) < 1e6:
            return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"
        return f"{value:.3g}"
    return str(value)


def percent(value: Any) -> str:
    """A share with two decimals, empty if absent."""
    share = real(value)
    return "" if share is None else f"{share:.2%}"


def epochs(value: Any) -> str:
    """How often a text is read; more digits below one, empty if absent."""
    count = real(value)
    return "" if count is None else f"{count:.2f}" if count >= 1 else f"{count:.3g}"


def large(value: Any) -> str:
    """A count that may be huge: 1,560,000, then 52 B."""
    amount = real(value)
    return number(value) if amount is None or amount < 1e9 else f"{amount / 1e9:,.4g} B"


def real(value: Any) -> float | None:
    """A finite float, or None for everything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def integer(value: Any) -> int | None:
    """An int, or None for everything else."""
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def as_list(value: Any) -> list[Any]:
    """A list, or an empty one for everything else."""
    return value if isinstance(value, list) else []


def mappings(value: Any) -> list[dict[str, Any]]:
    """The dictionaries in a list; empty for everything else."""
    return [item for item in as_list(value) if isinstance(item, dict)]


def mapping(value: Any) -> dict[str, Any]:
    """A dictionary, or an empty one for everything else."""
    return value if isinstance(value, dict) else {}


def duration(seconds: float) -> str:
    """Seconds in the two largest fitting units."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"


def unix_time(value: Any) -> float | None:
    """Seconds since 1970 of a time in ISO format, or None for everything else."""
    try:
        return datetime.fromisoformat(value).timestamp()
    except (TypeError, ValueError):
        return None


def clock(value: Any) -> str:
    """Date and time to the second, without the T."""
    return str(value or "")[:19].replace("T", " ")
