"""Where a run's checkpoints lie, which of them are published, and which are cleared away."""

from __future__ import annotations

import errno
import logging
import os
import re
import secrets
import shutil
import time
from pathlib import Path

from dist_cpt.checkpoint.verify import outline_problems
from dist_cpt.errors import WriteError

LOGGER = logging.getLogger("dist_cpt")
_STEP_NAME = re.compile(r"step-(\d{8,})")
_SUPERSEDED_NAME = re.compile(r"step-(\d{8,})\..+")


def checkpoints_folder(run_folder: Path) -> Path:
    """`<run>/checkpoints`."""
    return run_folder / "checkpoints"


def step_name(step: int) -> str:
    """`step-00000100`."""
    return f"step-{step:08d}"


def staging_name(step: int, attempt: int) -> str:
    """A name no other save ever uses: two attempts that both still run must not meet in one folder."""
    return f"{step_name(step)}.attempt-{attempt}-{secrets.token_hex(4)}.tmp"


def superseded_folder(run_folder: Path) -> Path:
    """Where a published checkpoint goes when a later attempt reaches its step with another state."""
    return checkpoints_folder(run_folder) / "superseded"


def published(run_folder: Path) -> list[Path]:
    """Published checkpoint folders, newest step first; whether they hold is another question."""
    return _numbered(checkpoints_folder(run_folder), _STEP_NAME)


def superseded(run_folder: Path) -> list[Path]:
    """Checkpoints that were moved aside, newest step first."""
    return _numbered(superseded_folder(run_folder), _SUPERSEDED_NAME)


def prune(run_folder: Path, newest: Path, keep: int) -> list[str]:
    """Remove all but the `keep` newest whole checkpoints up to `newest`, which was just published.

    Only what is older than the last one kept goes, so a damaged folder never counts as one of them, and
    `newest`, whose every byte was re-read, always stays. Returns the names of the removed ones.
    """
    up_to_here = [path for path in published(run_folder) if path.name <= newest.name]
    whole = [path for path in up_to_here if path == newest or not outline_problems(path)]
    old = [path for path in up_to_here if path.name < whole[keep - 1].name] if len(whole) >= keep else []
    # Of those moved aside the last one stays, for whoever wants to know what happened.
    old += sorted(superseded(run_folder), key=lambda path: path.lstat().st_mtime)[:-1]
    for path in old:
        # The new name first: a half-deleted folder must not look like a published one.
        doomed = path.with_name(f"{path.name}.pruned-{secrets.token_hex(4)}.tmp")
        os.rename(path, doomed)
        remove_folder(doomed)
    return [path.name for path in old]


def remove_stale_staging(run_folder: Path, older_than_seconds: float) -> list[str]:
    """Remove `.tmp` folders that nobody has written to for so long; rank 0, at the start of an attempt.

    An older attempt may still be alive somewhere, and its save with it: give it the time.
    """
    folders = [checkpoints_folder(run_folder), superseded_folder(run_folder)]
    removed = []
    for path in (child for folder in folders if folder.is_dir() for child in folder.glob("*.tmp")):
        if time.time() - _last_change(path) >= older_than_seconds:
            remove_folder(path)
            removed.append(path.name)
    return removed


def remove_folder(path: Path) -> None:
    """Delete a folder of ours if it is there; a failure is logged, because it harms no checkpoint."""
    try:
        shutil.rmtree(path)
    except FileNotFoundError:
        return
    except OSError as error:
        LOGGER.warning("could not remove %s: %s", path, error.strerror)


def fsync_path(path: Path) -> None:
    """Force a file, or a folder's list of names, to the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that cannot sync a folder
            raise
    finally:
        os.close(fd)


def write_error(error: Exception, run_folder: Path, step: int) -> WriteError:
    """The one line for a save that the file system refused."""
    strerror = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    code = errno.errorcode.get(error.errno or 0, "") if isinstance(error, OSError) else ""
    where = error.filename if isinstance(error, OSError) and error.filename else checkpoints_folder(run_folder)
    kept = [path.name for path in published(run_folder)]
    return WriteError(
        f"cannot save step {step} in {where}: {strerror}{f' ({code})' if code else ''}",
        remedy="free space there, or set output_dir to a disk that can be written; "
        + (f"the checkpoint {kept[0]} is kept" if kept else "no earlier checkpoint exists"),
    )


def _numbered(folder: Path, pattern: re.Pattern[str]) -> list[Path]:
    if not folder.is_dir():
        return []
    found = []
    for path in folder.iterdir():
        match = pattern.fullmatch(path.name)
        if match and path.suffix != ".tmp" and path.is_dir() and not path.is_symlink():
            found.append((int(match[1]), path.name, path))
    return [path for *_, path in sorted(found, reverse=True)]


def _last_change(path: Path) -> float:
    times = [path.lstat().st_mtime]
    for child in path.rglob("*"):
        try:
            times.append(child.lstat().st_mtime)
        except FileNotFoundError:  # its owner is at work
            return time.time()
    return max(times)
