"""A claim on a run folder without a run, and a later attempt that takes it over."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from dist_cpt.run_folder.claim import Claim
from dist_cpt.run_folder.json_files import write_object


def claimed(folder: Path, attempt: int = 0) -> Claim:
    """The claim of an attempt; current as long as no other is recorded in run.json."""
    return Claim(folder, attempt, "run7", f"token of {attempt}")


def take_over(folder: Path, attempt: int = 1) -> Claim:
    """Claim the folder for a later attempt."""
    write_object(folder / "run.json", {"token": f"token of {attempt}", "attempts": attempt + 1})
    return claimed(folder, attempt)


def meanwhile(claim: Claim, what: str, happens: Callable[[], object]) -> Claim:
    """The claim, where `happens` comes about in the middle of the change `what`, once: a freeze and what others do."""
    left = [what]

    def reached(change: str) -> None:
        if change in left:
            left.remove(change)
            happens()

    return replace(claim, reached=reached)
