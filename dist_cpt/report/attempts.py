"""The attempts of a run, and how each one ended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from html import escape

from dist_cpt.report.html_table import Html, Wide, number_cell, table
from dist_cpt.report.values import clock, duration, integer
from dist_cpt.run_folder.contents import RunFiles

OUTCOMES = {
    0: ("done", "good"),
    64: ("configuration error", "bad"),
    65: ("data error", "bad"),
    70: ("internal error", "bad"),
    71: ("numerical error", "bad"),
    72: ("hang", "bad"),
    73: ("cannot write", "bad"),
    74: ("checkpoint invalid", "bad"),
    75: ("stopped and saved", "warn"),
}


@dataclass
class Attempt:
    """One start or resume of the run, as the events and rows tell it."""

    number: int
    engine: str
    world_size: int | None
    device: str
    first_step: int
    resumed_from: str | None
    started: str
    last_step: int | None = None
    ended: str | None = None
    exit_code: int | None = None
    reason: str = ""

    @property
    def label(self) -> str:
        return f"{self.engine} ×{self.world_size}" if self.world_size else self.engine


def read_attempts(run: RunFiles) -> list[Attempt]:
    """The attempts in order; of rows without events, one attempt per number."""
    attempts: list[Attempt] = []
    for event in run.events:
        if event.get("kind") in ("start", "resume"):
            attempts.append(
                Attempt(
                    number=integer(event.get("attempt"), len(attempts)),
                    engine=str(event.get("engine", "?")),
                    world_size=event.get("world_size") if isinstance(event.get("world_size"), int) else None,
                    device=str(event.get("device", "")),
                    first_step=integer(event.get("first_step"), 0),
                    resumed_from=event.get("resumed_from"),
                    started=str(event.get("time", "")),
                )
            )
        elif event.get("kind") == "end" and attempts:
            last = attempts[-1]
            last.ended, last.reason = str(event.get("time", "")), str(event.get("reason", ""))
            last.exit_code = integer(event.get("exit_code"), 70)
            last.last_step = event.get("step") if isinstance(event.get("step"), int) else None
    reached: dict[int, list[int]] = {}
    for row in [*run.rewound, *run.steps]:
        if isinstance(row.get("step"), int):
            reached.setdefault(integer(row.get("attempt"), 0), []).append(row["step"])
    if not attempts:
        attempts = [Attempt(n, "engine unknown", None, "", min(s) - 1, None, "") for n, s in sorted(reached.items())]
    for attempt in attempts:
        if attempt.last_step is None and attempt.number in reached:
            attempt.last_step = max(reached[attempt.number])
    return attempts


def attempts_table(attempts: Sequence[Attempt]) -> str:
    """A row per attempt: engine, ranks, steps, how it ended."""
    rows = []
    for i, a in enumerate(attempts):
        if a.exit_code is not None:
            word, css = OUTCOMES.get(a.exit_code, (f"exit code {a.exit_code}", "bad"))
            outcome = Html(escape(word), css)
        else:
            outcome = Html("no end recorded" if i == len(attempts) - 1 else "killed or crashed", "warn")
        origin = f"resumed from {a.resumed_from}" if a.resumed_from else "from the start"
        begin = a.first_step + 1
        steps = f"{begin:,} to {a.last_step:,}" if a.last_step is not None and a.last_step >= begin else "none"
        ranks = number_cell(a.world_size)
        rows.append(
            [f"#{i}", a.engine, ranks, a.device, origin, steps, clock(a.started), _took(a), outcome, Wide(a.reason)]
        )
    heads = ["", "engine", ">ranks", "device", "began", "steps", "started (UTC)", "took", "ended", "reason"]
    return f'<h2>Attempts</h2><div class="card">{table(heads, rows)}</div>' if rows else ""


def _took(attempt: Attempt) -> str:
    try:
        start, end = datetime.fromisoformat(attempt.started), datetime.fromisoformat(attempt.ended or "")
        return duration((end - start).total_seconds())
    except (ValueError, TypeError):
        return ""
