"""One self-contained HTML page per run: what was learned, what was forgotten, and whether to believe it.

Everything comes from the files of the run folder, so a report can be made of a run that is going on, has
crashed, or was copied here from another machine. All text from the run is escaped.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from html import escape
from pathlib import Path
from statistics import median

from dist_cpt.errors import DataError, WriteError
from dist_cpt.report.attempts import OUTCOMES, Attempt, attempts_table, read_attempts
from dist_cpt.report.curves import curves, points_of
from dist_cpt.report.evidence import certificate_section, contract_section
from dist_cpt.report.held_out import headline, held_out_table
from dist_cpt.report.page import page
from dist_cpt.report.records import checkpoint_table, message_list, recipe_section, sample_section, token_ledger
from dist_cpt.report.values import duration, large, number
from dist_cpt.run_folder.contents import RunFiles, read_run


def write_report(run_folder: Path) -> Path:
    """Write `report.html` into a run folder and return its path.

    Raises:
        DataError: there is no such folder.
        WriteError: the page cannot be written; an earlier one is untouched.
    """
    if not run_folder.is_dir():
        raise DataError(f"run folder not found: {run_folder}", remedy="give the folder that `train` printed first")
    run = read_run(run_folder)
    target = run_folder / "report.html"
    temporary = run_folder / f"report.html.{os.getpid()}.tmp"
    try:
        temporary.write_bytes(report_html(run).encode("utf-8", errors="replace"))  # lone surrogates from JSON
        os.replace(temporary, target)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise WriteError(f"{target} cannot be written: {error.strerror}", remedy="make room, then try again") from error
    return target


def report_html(run: RunFiles) -> str:
    """The page as text."""
    name = str(run.recipe.get("name") or run.folder.name)
    attempts = read_attempts(run)
    sections = [
        _header(run, name, attempts),
        headline(run),
        _facts(run, attempts),
        curves(run, attempts),
        sample_section(run),
        held_out_table(run),
        token_ledger(run),
        contract_section(run),
        certificate_section(run),
        attempts_table(attempts),
        checkpoint_table(run),
        message_list(run),
        recipe_section(run),
    ]
    return page(f"{name}: training report", "".join(sections))


def _header(run: RunFiles, name: str, attempts: Sequence[Attempt]) -> str:
    text, css, reason = "no end recorded: still running, or killed", "warn", ""
    code = run.exit.get("code")
    if not isinstance(code, int) and attempts:
        code, reason = attempts[-1].exit_code, attempts[-1].reason
    if isinstance(code, int):
        text, css = OUTCOMES.get(code, (f"exit code {code}", "bad"))
        reason = str(run.exit.get("reason") or reason)
    elif not run.events and not run.steps:
        text = "not started"
    parts = [f'<header><h1>{escape(name)}</h1><span class="badge {css}">{escape(text)}</span></header>']
    if reason and reason != text:
        parts.append(f'<p class="soft">{escape(reason)}</p>')
    parts += [f'<p class="bad">{escape(problem)}</p>' for problem in run.problems]
    return "".join(parts)


def _facts(run: RunFiles, attempts: Sequence[Attempt]) -> str:
    if not run.steps:
        return '<p class="card" style="margin-top:14px">No optimizer step has been recorded yet.</p>'
    last = run.steps[-1]
    planned = next((e["num_steps"] for e in reversed(run.events) if isinstance(e.get("num_steps"), int)), None)
    speeds = [v for _, v in points_of(run.steps, "tokens_per_second") if v is not None]
    seconds = sum(v for _, v in points_of([*run.steps, *run.rewound], "step_seconds") if v is not None)
    memory = [v for _, v in points_of(run.steps, "memory_gib") if v is not None]
    lost = len(run.rewound)
    facts = [
        ("steps", number(last.get("step")) + (f" of {number(planned)}" if planned else "")),
        ("target tokens", large(last.get("tokens"))),
        ("last training loss", number(last.get("loss"))),
        ("median tokens/s", number(round(median(speeds)) if speeds else None)),
        ("peak memory", f"{number(max(memory) if memory else None)} GiB"),
        ("time in steps", duration(seconds)),
        ("skipped steps", number(last.get("skipped_total"))),
        ("attempts", number(len(attempts)) + (f", {lost:,} steps done twice" if lost else "")),
    ]
    cells = "".join(f"<div><span>{escape(label)}</span><b>{escape(value)}</b></div>" for label, value in facts)
    return f'<div class="facts">{cells}</div>'
