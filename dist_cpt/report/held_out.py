"""What was learned and what was forgotten, from the held-out sets."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from dist_cpt.report.html_table import Html, number_cell, table
from dist_cpt.report.run_files import RunFiles
from dist_cpt.report.values import number, real, relative_change


def headline(run: RunFiles) -> str:
    """A tile per held-out set: perplexity before and after, learned and forgotten apart."""
    sections = []
    for role, heading in (("domain", "What was learned"), ("retention", "What was forgotten")):
        tiles = [_tile(name, rows) for (name, kind), rows in by_set(run).items() if kind == role]
        if tiles:
            sections.append(f'<h2>{heading}</h2><div class="tiles">{"".join(tiles)}</div>')
        else:
            sections.append(f'<h2>{heading}</h2><p class="soft">no held-out set of role {role} was evaluated</p>')
    return "".join(sections)


def _tile(name: str, rows: Sequence[dict[str, Any]]) -> str:
    first, last = rows[0], rows[-1]
    title = f"held-out perplexity of {escape(name)}"
    if len(rows) == 1 or first.get("step") == last.get("step"):
        value = f"{number(first.get('perplexity'))} <small>at step {number(first.get('step'))}</small>"
        note = "evaluated once: nothing to compare with"
    else:
        change, css = relative_change(first.get("perplexity"), last.get("perplexity"))
        value = (
            f"{number(first.get('perplexity'))} → {number(last.get('perplexity'))} "
            f'<span class="{css}" style="font-size:inherit">{change}</span>'
        )
        note = f"step {number(first.get('step'))} to step {number(last.get('step'))}"
    return f'<div class="card tile"><span>{title}</span><b>{value}</b><span>{note}</span></div>'


def held_out_table(run: RunFiles) -> str:
    """Before, during and after for each held-out set, and every evaluation behind a fold."""
    sets = by_set(run)
    if not sets:
        return ""
    rows = []
    for (name, role), found in sets.items():
        values = [v for v in (real(row.get("perplexity")) for row in found) if v is not None]
        change, css = (
            relative_change(found[0].get("perplexity"), found[-1].get("perplexity")) if len(found) > 1 else ("", "")
        )
        between = f"{number(min(values))} to {number(max(values))} in {len(found)}" if values else ""
        rows.append(
            [
                name,
                role,
                number_cell(found[0].get("perplexity")),
                between,
                number_cell(found[-1].get("perplexity")),
                Html(change, css),
                number_cell(found[-1].get("num_tokens")),
            ]
        )
    heads = ["set", "role", ">before", "during, range", ">after", ">change", ">tokens"]
    every = [
        [
            number_cell(r.get("step")),
            str(r.get("name")),
            number_cell(r.get("loss")),
            number_cell(r.get("perplexity")),
            number_cell(r.get("attempt")),
        ]
        for r in run.evaluations[-1000:]
    ]
    detail = table([">step", "set", ">loss", ">perplexity", ">attempt"], every)
    return (
        f'<h2>Held-out perplexity</h2><div class="card">{table(heads, rows)}'
        f"<details><summary>every evaluation ({len(run.evaluations):,})</summary>{detail}</details></div>"
    )


def by_set(run: RunFiles) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Evaluations by (name, role), each in the order of the steps."""
    sets: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in run.evaluations:
        if isinstance(row.get("step"), int):
            sets.setdefault((str(row.get("name")), str(row.get("role", "domain"))), []).append(row)
    return {key: sorted(rows, key=lambda row: row["step"]) for key, rows in sets.items()}
