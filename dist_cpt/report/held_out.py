"""What was learned and what was forgotten, from the held-out sets."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from dist_cpt.report.html_table import Html, number_cell, table
from dist_cpt.report.values import number, real, relative_change
from dist_cpt.run_folder.contents import RunFiles


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
    key = measure(rows)
    title = f"held-out {key} of {escape(name)}"
    if len(rows) == 1 or first.get("step") == last.get("step"):
        value = f"{number(first.get(key))} <small>at step {number(first.get('step'))}</small>"
        note = "evaluated once: nothing to compare with"
    else:
        change, css = _change(key, first, last)
        value = (
            f"{number(first.get(key))} → {number(last.get(key))} "
            f'<span class="{css}" style="font-size:inherit">{change}</span>'
        )
        note = f"step {number(first.get('step'))} to step {number(last.get('step'))}"
    return f'<div class="card tile"><span>{title}</span><b>{value}</b><span>{note}</span></div>'


def measure(rows: Sequence[dict[str, Any]]) -> str:
    """What a held-out set is judged by: accuracy for classes, else perplexity."""
    return "accuracy" if rows and "accuracy" in rows[0] else "perplexity"


def _change(key: str, first: dict[str, Any], last: dict[str, Any]) -> tuple[str, str]:
    """The change in words and its class: less perplexity is good, more accuracy is."""
    if key == "perplexity":
        return relative_change(first.get(key), last.get(key))
    before, after = real(first.get(key)), real(last.get(key))
    if before is None or after is None:
        return "", ""
    points = 100 * (after - before)
    return f"{points:+.1f} points", "good" if points > 0 else "bad" if points < 0 else ""


def held_out_table(run: RunFiles) -> str:
    """Before, during and after for each held-out set, and every evaluation behind a fold."""
    sets = by_set(run)
    if not sets:
        return ""
    rows = []
    for (name, role), found in sets.items():
        key = measure(found)
        values = [v for v in (real(row.get(key)) for row in found) if v is not None]
        change, css = _change(key, found[0], found[-1]) if len(found) > 1 else ("", "")
        between = f"{number(min(values))} to {number(max(values))} in {len(found)}" if values else ""
        rows.append(
            [
                name,
                role,
                number_cell(found[0].get(key)),
                between,
                number_cell(found[-1].get(key)),
                Html(change, css),
                number_cell(found[-1].get("num_tokens")),
            ]
        )
    heads = ["set", "role", ">before", "during, range", ">after", ">change", ">tokens"]
    keys = {measure(found) for found in sets.values()}
    shown = ["accuracy", "macro_f1"] if keys == {"accuracy"} else ["perplexity"]
    every = [
        [number_cell(r.get("step")), str(r.get("name")), *(number_cell(r.get(k)) for k in ["loss", *shown, "attempt"])]
        for r in run.evaluations[-1000:]
    ]
    heads_of_all = [">step", "set", ">log-loss" if "macro_f1" in shown else ">loss"]
    detail = table([*heads_of_all, *(f">{k.replace('_', '-')}" for k in shown), ">attempt"], every)
    return (
        f'<h2>Held-out {" and ".join(sorted(keys))}</h2><div class="card">{table(heads, rows)}'
        f"<details><summary>every evaluation ({len(run.evaluations):,})</summary>{detail}</details></div>"
    )


def by_set(run: RunFiles) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Evaluations by (name, role), each in the order of the steps."""
    sets: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in run.evaluations:
        if isinstance(row.get("step"), int):
            sets.setdefault((str(row.get("name")), str(row.get("role", "domain"))), []).append(row)
    return {key: sorted(rows, key=lambda row: row["step"]) for key, rows in sets.items()}
