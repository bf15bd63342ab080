"""Why to believe the run: the trainability contract and the resume certificate with their checks."""

from __future__ import annotations

from html import escape
from typing import Any

from dist_cpt.report.html_table import Html, Wide, number_cell, table
from dist_cpt.report.values import items, number
from dist_cpt.run_folder.contents import RunFiles


def contract_section(run: RunFiles) -> str:
    """The parameter groups and the checks of contract.json."""
    if not run.contract:
        return ""
    groups = [g for g in items(run.contract.get("groups")) if isinstance(g, dict)]
    rows = [
        [
            str(g.get("name")),
            number_cell(g.get("num_tensors")),
            number_cell(g.get("num_parameters")),
            f"{g.get('compute_dtype')} / {g.get('master_dtype')}",
            number_cell(g.get("peak_lr")),
            number_cell(g.get("weight_decay")),
            str(g.get("sharding", "")),
        ]
        for g in groups
    ]
    frozen = run.contract.get("frozen")
    if isinstance(frozen, dict) and frozen.get("num_tensors"):
        per_rank = [n for n in items(frozen.get("num_parameters_per_rank")) if isinstance(n, int)]
        count = f"{max(per_rank):,} per rank" if per_rank else number(frozen.get("num_parameters"))
        dtype = ", ".join(map(str, items(frozen.get("dtype")))) or str(frozen.get("dtype", ""))
        rows.append(
            [
                "frozen",
                number_cell(frozen["num_tensors"]),
                Html(escape(count), "n"),
                dtype,
                number_cell("-"),
                number_cell("-"),
                "",
            ]
        )
    heads = ["group", ">tensors", ">parameters", "compute / master", ">peak lr", ">decay", "sharding"]
    ties = "".join(
        f'<p class="soft">tied: {escape(" = ".join(map(str, pair)))}</p>'
        for pair in items(run.contract.get("ties"))
        if isinstance(pair, list)
    )
    tensors = [
        [str(g.get("name")), str(t.get("name")), " × ".join(map(str, items(t.get("shape"))))]
        for g in groups
        for t in items(g.get("tensors"))
        if isinstance(t, dict)
    ]
    detail = table(["group", "tensor", "shape"], tensors)
    return (
        f'<h2>Trainability contract</h2><div class="card">{table(heads, rows)}{ties}'
        f"<h3>Checks</h3>{_checks(run.contract.get('checks'))}"
        f"<details><summary>every trainable tensor ({len(tensors):,})</summary>{detail}</details></div>"
    )


def certificate_section(run: RunFiles) -> str:
    """The verdict and the checks of certificate.json."""
    certificate = run.certificate
    if not certificate:
        return ""
    passed = certificate.get("verdict") == "pass"
    verdict = escape(str(certificate.get("verdict", "no verdict")))
    badge = f'<span class="badge {"good" if passed else "bad"}">{verdict}</span>'
    sides = []
    for key, words in (("saved_by", "saved by"), ("restored_by", "restored by")):
        side = certificate.get(key)
        if isinstance(side, dict):
            sides.append(f"{words} {side.get('engine')} on {side.get('world_size')} ranks")
    where = f"step {number(certificate.get('step'))}" + (", " if sides else "") + ", ".join(sides)
    return (
        f'<h2>Resume certificate</h2><div class="card"><p>{badge} {escape(where)}</p>'
        f"{_checks(certificate.get('checks'))}</div>"
    )


def _checks(checks: Any) -> str:
    found = [check for check in items(checks) if isinstance(check, dict)]
    rows = []
    for check in found:
        verdicts = {True: ("passed", "good"), False: ("failed", "bad")}
        word, css = verdicts.get(check.get("passed"), ("not checked", "warn"))  # type: ignore[arg-type]
        step = (
            [number_cell(check["step"])]
            if "step" in found[0] and "step" in check
            else [Html("")]
            if "step" in found[0]
            else []
        )
        rows.append([Html(word, css), str(check.get("name", "")), *step, Wide(str(check.get("detail", "")))])
    heads = ["verdict", "check", *([">step"] if found and "step" in found[0] else []), "detail"]
    return table(heads, rows) if rows else '<p class="soft">none recorded</p>'
