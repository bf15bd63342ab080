"""exit.json: how the last attempt ended. torchrun and srun flatten exit codes; this file keeps the run's own."""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

from dist_cpt.errors import EXIT_HANG, EXIT_SUPERSEDED, StorageError
from dist_cpt.run_folder.json_files import glance, read_object
from dist_cpt.run_folder.names import EXIT, RUN

Stamp = tuple[int, int] | None


def stamp(run_folder: Path) -> Stamp:
    """Identifies the present exit.json; None if there is none."""
    with contextlib.suppress(OSError):
        status = (run_folder / EXIT).stat()
        return status.st_ino, status.st_mtime_ns
    return None


def exit_code(run_folder: Path, before: Stamp, code: int) -> int:
    """The code in exit.json if it was written since the stamp `before`, else `code`.

    `code` also replaces a recorded 0: a rank may have crashed after it was written.
    """
    if code == EXIT_SUPERSEDED or stamp(run_folder) == before:  # exit.json is the later attempt's
        return code
    try:
        recorded = int(read_object(run_folder / EXIT)["code"])
    except (StorageError, ValueError, KeyError, TypeError):
        return code
    return recorded if recorded != 0 else code


@dataclass(frozen=True)
class Hang:
    """An ending that a rank's watchdog records while the main thread hangs."""

    reason: str
    step: int
    attempt: int


def write_first_hang(run_folder: Path, hang: Hang, rank: int) -> bool:
    """Write exit.json unless it exists or a later attempt has claimed the folder; whether `rank` was the first.

    A folder that cannot be written leaves every rank the first: each then reports by itself.
    """
    if superseded(run_folder, hang.attempt):
        return False
    path = run_folder / EXIT
    with contextlib.suppress(OSError):
        temporary = _write_temporary(run_folder, hang, rank)
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        except OSError:  # a file system without hard links
            if path.exists():
                return False
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        if superseded(run_folder, hang.attempt):
            path.unlink(missing_ok=True)
            return False
    return True


def replace_hang(run_folder: Path, hang: Hang, rank: int) -> None:
    """Replace exit.json by a more complete reason, if the folder can be written."""
    with contextlib.suppress(OSError):
        if not superseded(run_folder, hang.attempt):
            os.replace(_write_temporary(run_folder, hang, rank), run_folder / EXIT)


def superseded(run_folder: Path, attempt: int) -> bool:
    """Whether a later attempt than `attempt` has claimed the folder, as far as it can be read at once."""
    return glance(run_folder / RUN).get("attempts", 0) - 1 > attempt


def hang_reason(run_folder: Path, attempt: int) -> str | None:
    """Why a rank of `attempt` has ended the run as hung; None if none has."""
    end = glance(run_folder / EXIT)
    return str(end.get("reason")) if (end.get("code"), end.get("attempt")) == (EXIT_HANG, attempt) else None


def _write_temporary(run_folder: Path, hang: Hang, rank: int) -> Path:
    """Not forced to the disk: a sync may be what hangs."""
    path = run_folder / f"{EXIT}.rank-{rank}.tmp"
    content = {"code": EXIT_HANG, "reason": hang.reason, "step": hang.step, "attempt": hang.attempt}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return path
