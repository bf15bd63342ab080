"""One self-contained HTML page per run: what was learned, what was forgotten, and the evidence for it.

Everything comes from the files of the run folder, so that a report can be made of a run that is in progress, has
crashed, or was copied from another machine. The templates escape all text and load nothing from elsewhere.
"""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import jinja2
from markupsafe import Markup

from dist_cpt.errors import DataError, WriteError
from dist_cpt.report.attempts import Attempt, outcome, read_attempts
from dist_cpt.report.curves import HELD_OUT, curves, points_of
from dist_cpt.report.gauge import gauge, summary
from dist_cpt.report.goodput import goodput_of
from dist_cpt.report.held_out import held_out_sets, measured_later
from dist_cpt.report.ledger import saved_checkpoints, token_ledger
from dist_cpt.report.predictions import predictions
from dist_cpt.report.values import as_list, clock, duration, epochs, integer, large, mappings, number, percent
from dist_cpt.run_folder.contents import RunFiles, read_run
from dist_cpt.run_folder.json_files import remove_quietly
from dist_cpt.run_folder.names import REPORT

TEMPLATES = Path(__file__).parent / "templates"


def write_report(run_folder: Path, target: Path | None = None) -> Path:
    """Write the page of a run, by default `report.html` in its folder, and return its path.

    Raises:
        DataError: there is no such folder.
        WriteError: the page cannot be written; an earlier one is untouched.
    """
    if not run_folder.is_dir():
        raise DataError(f"run folder not found: {run_folder}", remedy="pass the folder that `train` printed first")
    return write_page(report_html(read_run(run_folder)), target or run_folder / REPORT)


def write_page(html: str, target: Path) -> Path:
    """Replace the file `target`, and return its path.

    Raises:
        WriteError: it cannot be written; an earlier page is untouched.
    """
    temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    page = html.encode("utf-8", errors="replace")  # JSON may contain lone surrogates
    try:
        temporary.write_bytes(page)
        os.replace(temporary, target)
    except OSError as error:
        remove_quietly(temporary)
        raise WriteError(f"{target} cannot be written: {error.strerror}", remedy="free space and try again") from error
    return target


def environment() -> jinja2.Environment:
    """The templates, which escape all text, and the filters that they use."""
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters = (as_list, clock, duration, epochs, mappings, number, outcome, percent)
    templates.filters |= {function.__name__: function for function in filters}
    return templates


def report_html(run: RunFiles, *, refresh_seconds: int | None = None) -> str:
    """The page as text; with `refresh_seconds` a browser loads it again and again."""
    attempts, held_out = read_attempts(run), held_out_sets(run)
    charts = curves(run, attempts, held_out)
    return render(
        "page.html",
        refresh_seconds,
        run=run,
        name=name_of(run),
        status=status_of(run, attempts),
        facts=_facts(run, attempts) if run.steps else [],
        held_out=held_out,
        later=measured_later(run),
        gauge=gauge([("this run", held_out)]),
        gauge_summary=summary(held_out),
        held_out_charts=[chart for chart in charts if chart.title.startswith(HELD_OUT)],
        charts=[chart for chart in charts if not chart.title.startswith(HELD_OUT)],
        samples=samples_of(run),
        predictions=predictions(run.plan),
        plan=run.plan,
        sources=token_ledger(run),
        attempts=attempts,
        goodput=goodput_of(run),
        checkpoints=saved_checkpoints(run),
        messages=[event for event in run.events if event.get("kind") == "message"],
    )


def render(template: str, refresh_seconds: int | None = None, **content: Any) -> str:
    """A page of the templates, which may run the one script that shows values, and nothing else."""
    script = (TEMPLATES / "hover.js").read_text(encoding="utf-8")
    sha256 = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    parts = {"script": Markup(script), "script_sha256": sha256, "refresh_seconds": refresh_seconds}
    return environment().get_template(template).render(**content, **parts)


def name_of(run: RunFiles) -> str:
    return str(run.recipe.get("name") or run.folder.name)


def samples_of(run: RunFiles) -> list[dict[str, Any]]:
    """The texts after the same prompt, over the steps; of earlier versions only the last one."""
    kept = [one for one in mappings(run.sample.get("samples")) if "text" in one]
    return kept or ([run.sample] if "text" in run.sample else [])


def status_of(run: RunFiles, attempts: Sequence[Attempt]) -> dict[str, str]:
    """How the run ended, from exit.json or else its last event: text, CSS class, reason."""
    code, reason = integer(run.exit.get("code")), str(run.exit.get("reason") or "")
    if code is None and attempts:
        code = attempts[-1].exit_code
    if code is not None:
        text, css = outcome(code)
        return {"text": text, "css": css, "reason": reason or (attempts[-1].reason if attempts else "")}
    started = run.events or run.steps
    text = "no end recorded: still running, or killed" if started else "not started"
    return {"text": text, "css": "warn", "reason": attempts[-1].reason if attempts else ""}


def _facts(run: RunFiles, attempts: Sequence[Attempt]) -> list[tuple[str, str]]:
    last = run.steps[-1]
    planned = next((e["num_steps"] for e in reversed(run.events) if isinstance(e.get("num_steps"), int)), None)
    speeds = [speed for _, speed in points_of(run.steps, "tokens_per_second") if speed is not None]
    seconds = sum(time for _, time in points_of([*run.steps, *run.rewound], "step_seconds") if time is not None)
    used = [mfu for _, mfu in points_of(run.steps, "mfu") if mfu is not None]
    goodput = goodput_of(run)
    memory = [gib for _, gib in points_of(run.steps, "memory_gib") if gib is not None]
    repeated = len(run.rewound)
    return [
        ("steps", number(last.get("step")) + (f" of {number(planned)}" if planned else "")),
        ("target tokens", large(last.get("tokens"))),
        ("last training loss", number(last.get("loss"))),
        ("median tokens/s", number(round(median(speeds)) if speeds else None)),
        *([("median MFU", f"{median(used):.1%}")] if used else []),
        ("peak memory", f"{number(max(memory) if memory else None)} GiB"),
        ("time in steps", duration(seconds)),
        *([("goodput", f"{goodput.fraction:.0%}")] if goodput is not None and goodput.wall else []),
        ("skipped steps", number(last.get("skipped_total"))),
        ("attempts", number(len(attempts)) + (f" ({repeated:,} steps repeated)" if repeated else "")),
    ]
