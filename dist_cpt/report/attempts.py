"""The attempts of a run, and how each one ended."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime

from dist_cpt.errors import EXIT_DONE, EXIT_INTERNAL, EXIT_STOPPED, EXIT_WORDS
from dist_cpt.report.values import duration, integer
from dist_cpt.run_folder.contents import RunFiles


@dataclass(frozen=True)
class Attempt:
    """One start or resume of the run, from its events and rows."""

    number: int
    first_step: int  # steps done before it
    engine: str = "engine unknown"
    world_size: int | None = None
    device: str = ""
    resumed_from: str | None = None
    started: str = ""
    last_step: int | None = None
    ended: str = ""
    exit_code: int | None = None
    reason: str = ""

    @property
    def label(self) -> str:
        return f"{self.engine} ×{self.world_size}" if self.world_size else self.engine

    @property
    def steps(self) -> str:
        """`1 to 180`."""
        begin = self.first_step + 1
        return f"{begin:,} to {self.last_step:,}" if self.last_step is not None and self.last_step >= begin else "none"

    @property
    def took(self) -> str:
        try:
            start, end = datetime.fromisoformat(self.started), datetime.fromisoformat(self.ended)
            return duration((end - start).total_seconds())
        except (ValueError, TypeError):
            return ""


def outcome(exit_code: int) -> tuple[str, str]:
    """The exit code in words, and their CSS class."""
    css = {EXIT_DONE: "good", EXIT_STOPPED: "warn"}.get(exit_code, "bad")
    return EXIT_WORDS.get(exit_code, f"exit code {exit_code}"), css


def read_attempts(run: RunFiles) -> list[Attempt]:
    """The attempts in order; for rows without events, one attempt per number in them."""
    attempts: list[Attempt] = []
    for event in run.events:
        if event.get("kind") in ("start", "resume"):
            number = integer(event.get("attempt"))
            attempts.append(
                Attempt(
                    number=len(attempts) if number is None else number,
                    first_step=integer(event.get("first_step")) or 0,
                    engine=str(event.get("engine", "?")),
                    world_size=integer(event.get("world_size")),
                    device=str(event.get("device", "")),
                    resumed_from=event.get("resumed_from"),
                    started=str(event.get("time", "")),
                )
            )
        elif event.get("kind") == "end" and attempts:
            code = integer(event.get("exit_code"))
            attempts[-1] = replace(
                attempts[-1],
                last_step=integer(event.get("step")),
                ended=str(event.get("time", "")),
                exit_code=EXIT_INTERNAL if code is None else code,
                reason=str(event.get("reason", "")),
            )
    steps: dict[int, list[int]] = {}
    for row in [*run.rewound, *run.steps]:
        if isinstance(row.get("step"), int):
            steps.setdefault(integer(row.get("attempt")) or 0, []).append(row["step"])
    if not attempts:
        attempts = [Attempt(number, min(of_attempt) - 1) for number, of_attempt in sorted(steps.items())]
    return [
        replace(a, last_step=max(steps[a.number])) if a.last_step is None and a.number in steps else a for a in attempts
    ]
