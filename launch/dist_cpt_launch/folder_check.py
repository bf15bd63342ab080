"""What a run needs of a file system, tried in a folder: `python -m dist_cpt_launch.folder_check FOLDER`.

A process of its own, since a file system that hangs also blocks the process that asks it. It prints one JSON object.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from dist_cpt_launch.node_checks import write_speed

WRITE_MIB = 16


def check_folder(folder: Path) -> dict[str, Any]:
    """Locks, fsync, rename, free space and speed; `problem` is what a run cannot do without.

    Raises:
        OSError: the folder cannot be made or written.
    """
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=".doctor-", dir=folder))
    try:
        speed, skew = write_speed(work, WRITE_MIB)
        return {
            "type": _type_of(folder),
            "free_gb": shutil.disk_usage(folder).free / 1e9,
            "locks": _has_locks(work / "lock"),
            "problem": _rename_problem(work),
            "mib": WRITE_MIB,
            "mb_per_s": speed,
            "skew_seconds": skew,
        }
    finally:
        shutil.rmtree(work, ignore_errors=True)
        if made:
            folder.rmdir()


def _has_locks(path: Path) -> bool:
    """Whether a second open of a locked file is refused."""
    with path.open("a") as first, path.open("a") as second:
        try:
            fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        try:
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


def _rename_problem(work: Path) -> str:
    """Why a folder and a file cannot be published by a rename that is forced to the disk; empty if they can."""
    try:
        (work / "staged").mkdir()
        (work / "staged/file").write_bytes(b"new")
        (work / "file").write_bytes(b"old")
        os.rename(work / "staged", work / "published")
        os.replace(work / "published/file", work / "file")
        descriptor = os.open(work, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        return f"a rename or the fsync of a folder fails: {error.strerror or error}"
    return "" if (work / "file").read_bytes() == b"new" else "a rename does not replace a file"


def _type_of(folder: Path) -> str:
    """The file system's type, of the longest mount point above the folder. Source: proc_mounts(5)."""
    path, best = str(folder.resolve()), ("", "unknown")
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, place, kind = line.split()[:3]
        if (path == place or path.startswith(place.rstrip("/") + "/")) and len(place) >= len(best[0]):
            best = place, kind
    return best[1]


if __name__ == "__main__":
    try:
        print(json.dumps(check_folder(Path(sys.argv[1]))))
    except OSError as error:
        print(json.dumps({"failed": f"{error.filename or sys.argv[1]} cannot be written: {error.strerror or error}"}))
