"""HTML tables whose cells are text unless they say that they are HTML."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from dist_cpt.report.values import number


@dataclass(frozen=True)
class Html:
    """A table cell that is HTML already, with a CSS class."""

    html: str
    css: str = "n"


@dataclass(frozen=True)
class Wide:
    """A table cell of long text that may break anywhere."""

    text: str


def table(heads: Sequence[str], rows: Iterable[Sequence[str | Html | Wide]]) -> str:
    """An HTML table; a head that starts with > is right-aligned, plain cells are escaped."""
    head = "".join(f'<th class="n">{h[1:]}</th>' if h.startswith(">") else f"<th>{h}</th>" for h in heads)
    lines = []
    for row in rows:
        cells = []
        for title, cell in zip(heads, row, strict=True):
            css = "n " if title.startswith(">") else ""
            if isinstance(cell, Html):
                cells.append(f'<td class="{css}{cell.css}">{cell.html}</td>')
            elif isinstance(cell, Wide):
                cells.append(f'<td class="w">{escape(cell.text)}</td>')
            else:
                cells.append(f'<td class="{css}">{escape(cell)}</td>' if css else f"<td>{escape(cell)}</td>")
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def number_cell(value: Any) -> Html:
    """A right-aligned cell for a number that may be absent."""
    return Html(escape(number(value)))
