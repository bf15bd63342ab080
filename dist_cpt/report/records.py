"""What else a run noted: tokens by source, checkpoints, messages, a sample, the recipe."""

from __future__ import annotations

from html import escape
from pathlib import Path

from dist_cpt.report.html_table import Html, Wide, number_cell, table
from dist_cpt.report.values import clock, integer, number, real
from dist_cpt.run_folder.contents import RunFiles

_MAX_MESSAGES = 200


def token_ledger(run: RunFiles) -> str:
    """Tokens of each source: the share that was asked for and the share that was trained on."""
    achieved: dict[str, int] = {}
    for row in run.steps:
        by_source = row.get("tokens_by_source")
        for name, count in (by_source if isinstance(by_source, dict) else {}).items():
            achieved[str(name)] = achieved.get(str(name), 0) + integer(count, 0)
    data = run.recipe.get("data")
    sources = data.get("sources") if isinstance(data, dict) else None
    asked = {
        str(s.get("name") or s.get("path")): (real(s.get("weight", 1.0)) or 0.0, str(s.get("role", "domain")))
        for s in (sources if isinstance(sources, list) else [])
        if isinstance(s, dict)
    }
    if not asked and not achieved:
        return ""
    weights, total = sum(w for w, _ in asked.values()), sum(achieved.values())
    rows = [
        [
            name,
            asked[name][1] if name in asked else "",
            Html(f"{asked[name][0] / weights:.2%}" if name in asked and weights else ""),
            Html(f"{achieved.get(name, 0) / total:.2%}" if total else ""),
            number_cell(achieved.get(name, 0)),
        ]
        for name in dict.fromkeys([*asked, *achieved])
    ]
    note = "Asked is the share of packed blocks, trained the share of tokens: blocks differ in padding."
    heads = ["source", "role", ">asked", ">trained", ">tokens"]
    return f'<h2>Tokens by source</h2><div class="card">{table(heads, rows)}<p class="soft">{note}</p></div>'


def checkpoint_table(run: RunFiles) -> str:
    """What was saved when, and what is still on disk."""
    rows, on_disk = [], set(run.checkpoints)
    for event in run.events:
        if event.get("kind") == "checkpoint":
            name = Path(str(event.get("path", ""))).name
            size, seconds = real(event.get("num_bytes")), real(event.get("seconds"))
            rows.append(
                [
                    number_cell(event.get("step")),
                    name,
                    Html(f"{size / 2**20:,.1f} MiB" if size is not None else "", "n"),
                    Html(f"{seconds:.1f} s" if seconds is not None else "", "n"),
                    clock(str(event.get("time", ""))),
                    "on disk" if name in on_disk else "removed",
                ]
            )
    shown = {row[1] for row in rows}
    rows += [[Html(""), name, Html(""), Html(""), "", "on disk"] for name in run.checkpoints if name not in shown]
    if not rows:
        return ""
    heads = [">step", "checkpoint", ">size", ">took", "saved (UTC)", ""]
    kept = f"{len(on_disk)} on disk, {len(rows)} saved"
    return f'<h2>Checkpoints</h2><details class="card"><summary>{kept}</summary>{table(heads, rows)}</details>'


def message_list(run: RunFiles) -> str:
    """What the run said, folded."""
    said = [e for e in run.events if e.get("kind") == "message"]
    if not said:
        return ""
    rows = [[clock(str(e.get("time", ""))), Wide(str(e.get("text", "")))] for e in said[-_MAX_MESSAGES:]]
    cut = f", the last {_MAX_MESSAGES}" if len(said) > _MAX_MESSAGES else ""
    body = table(["time (UTC)", "message"], rows)
    return f'<h2>Messages</h2><details class="card"><summary>{len(said)} messages{cut}</summary>{body}</details>'


def sample_section(run: RunFiles) -> str:
    """The generated sample with its prompt."""
    if "text" not in run.sample:
        return ""
    prompt, text = escape(str(run.sample.get("prompt", ""))), escape(str(run.sample["text"]))
    note = f"Continuation by the model of step {number(run.sample.get('step'))}; the marked part is its own."
    return (
        f'<h2>A sample</h2><div class="card sample"><pre>{prompt}<mark>{text}</mark></pre>'
        f'<p class="soft">{note}</p></div>'
    )


def recipe_section(run: RunFiles) -> str:
    """The resolved recipe, folded."""
    if not run.recipe_text:
        return ""
    body = f"<pre>{escape(run.recipe_text)}</pre>"
    return f'<h2>Recipe</h2><details class="card"><summary>recipe.yaml, resolved</summary>{body}</details>'
