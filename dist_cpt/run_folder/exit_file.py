"""exit.json: how the last attempt ended. torchrun and srun flatten exit codes; this file keeps the run's own."""

from __future__ import annotations

import contextlib
from pathlib import Path

from dist_cpt.run_folder.json_files import read_object, write_object
from dist_cpt.run_folder.names import EXIT

Stamp = tuple[int, int] | None


def write_exit(run_folder: Path, code: int, reason: str, step: int) -> None:
    """Record how an attempt ended.

    Raises:
        WriteError: the file cannot be written.
    """
    write_object(run_folder / EXIT, {"code": code, "reason": reason, "step": step})


def stamp(run_folder: Path) -> Stamp:
    """Which exit.json is there now; None if there is none."""
    with contextlib.suppress(OSError):
        found = (run_folder / EXIT).stat()
        return found.st_ino, found.st_mtime_ns
    return None


def exit_code(run_folder: Path, before: Stamp, code: int) -> int:
    """The code in exit.json unless that is still the file `before`, else `code`; no clock is compared.

    A rank that crashed after a 0 was written counts.
    """
    if stamp(run_folder) == before:
        return code
    try:
        recorded = int(read_object(run_folder / EXIT)["code"])
    except (OSError, ValueError, KeyError, TypeError):
        return code
    return recorded if recorded != 0 else code
