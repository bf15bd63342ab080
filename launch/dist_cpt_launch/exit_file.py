"""What the ranks of one start wrote into exit.json; torchrun and srun flatten exit codes."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

Stamp = tuple[int, int] | None


def stamp(run_folder: Path) -> Stamp:
    """Which exit.json is there now; None if there is none."""
    with contextlib.suppress(OSError):
        found = (run_folder / "exit.json").stat()
        return found.st_ino, found.st_mtime_ns
    return None


def exit_code(run_folder: Path, before: Stamp, code: int) -> int:
    """The run's own code: that in exit.json if it is not the one from `before`, whatever the clocks say, else `code`.

    A rank that crashed after a 0 was written counts.
    """
    if stamp(run_folder) == before:
        return code
    try:
        recorded = int(json.loads((run_folder / "exit.json").read_text(encoding="utf-8"))["code"])
    except (OSError, ValueError, KeyError, TypeError):
        return code
    return recorded if recorded != 0 else code
