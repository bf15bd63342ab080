"""One self-contained HTML page per token store: what is in it, where it came from, and how to recognise it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dist_cpt.report.report import environment


def store_page(facts: dict[str, Any]) -> str:
    """The page as text."""
    highest = max((count for _, _, count in facts["lengths"]["histogram"]), default=1)
    bars = [
        {"range": f"{low:,} to {high:,}" if high > low else f"{low:,}", "count": count, "share": count / highest}
        for low, high, count in facts["lengths"]["histogram"]
    ]
    return environment().get_template("store.html").render(facts=facts, bars=bars, name=Path(facts["store"]).name)
