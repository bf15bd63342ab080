"""The checkpoint folders of a run: their names, which are published, their manifest and state."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import stat
from pathlib import Path

from dist_cpt.errors import CheckpointError, StorageError, WriteError
from dist_cpt.run_folder.manifest import Manifest, manifest_from_bytes
from dist_cpt.run_folder.names import CHECKPOINTS, MANIFEST, STATE, SUPERSEDED
from dist_cpt.run_folder.train_state import TrainState, state_from_bytes
from dist_cpt.storage import patiently, read_bytes

_STEP_NAME = re.compile(r"step-(\d{8,})")
_SUPERSEDED_NAME = re.compile(r"step-(\d{8,})\..+")


def checkpoints_folder(run_folder: Path) -> Path:
    """`<run>/checkpoints`."""
    return run_folder / CHECKPOINTS


def step_name(step: int) -> str:
    """`step-00000100`."""
    return f"step-{step:08d}"


def step_of(path: Path) -> int:
    """The step in the name of a checkpoint, published or moved aside."""
    return int(path.name.removeprefix("step-").partition(".")[0])


def staging_name(step: int, attempt: int) -> str:
    """A name that no other save uses: two attempts that are both alive must not share a folder."""
    return f"{step_name(step)}.attempt-{attempt}-{secrets.token_hex(4)}.tmp"


def superseded_folder(run_folder: Path) -> Path:
    """Where a published checkpoint is moved when a later attempt reaches its step with another state."""
    return checkpoints_folder(run_folder) / SUPERSEDED


def published(run_folder: Path) -> list[Path]:
    """Published checkpoint folders and links to such, newest step first, valid or not.

    Raises:
        StorageError: the file system does not answer.
    """
    return _numbered(checkpoints_folder(run_folder), _STEP_NAME)


def superseded(run_folder: Path) -> list[Path]:
    """Checkpoints that were moved aside, newest step first."""
    return _numbered(superseded_folder(run_folder), _SUPERSEDED_NAME)


def write_error(error: Exception, run_folder: Path, step: int) -> WriteError:
    """The error for a save that the file system refused."""
    strerror = getattr(error, "strerror", None) or getattr(error, "message", None) or str(error)
    code = errno.errorcode.get(error.errno or 0, "") if isinstance(error, OSError) else ""
    where = error.filename if isinstance(error, OSError) and error.filename else checkpoints_folder(run_folder)
    kept = []
    with contextlib.suppress(StorageError):
        kept = [path.name for path in published(run_folder)]
    return WriteError(
        f"cannot save step {step} in {where}: {strerror}{f' ({code})' if code else ''}",
        remedy="free space there, or set output_dir to a disk that can be written; "
        + (f"the checkpoint {kept[0]} is kept" if kept else "earlier checkpoints are untouched"),
    )


def _numbered(folder: Path, pattern: re.Pattern[str]) -> list[Path]:
    try:
        names = patiently(folder, lambda: os.listdir(folder))
    except OSError:
        return []
    matches = [match for name in names if not name.endswith(".tmp") and (match := pattern.fullmatch(name))]
    newest_first = sorted(((int(match[1]), match[0]) for match in matches), reverse=True)
    return [path for _, name in newest_first if _is_folder_or_link(path := folder / name)]


def _is_folder_or_link(path: Path) -> bool:
    """A link may lead to a folder that was moved to another disk; one that leads nowhere is a damaged checkpoint."""
    try:
        mode = patiently(path, path.lstat, expected=True).st_mode
    except OSError:
        return False
    return stat.S_ISDIR(mode) or stat.S_ISLNK(mode)


def read_manifest(path: Path) -> Manifest:
    """The manifest of a checkpoint folder.

    Raises:
        CheckpointError: missing or damaged.
        StorageError: the file system does not answer.
    """
    return manifest_from_bytes(_read_small(path, MANIFEST))


def read_state(path: Path) -> TrainState:
    """The training state of a checkpoint folder.

    Raises:
        CheckpointError: missing or damaged.
        StorageError: the file system does not answer.
    """
    return state_from_bytes(_read_small(path, STATE))


def _read_small(path: Path, name: str) -> bytes:
    try:
        return read_bytes(path / name, os.O_NOFOLLOW, expected=True)
    except OSError as error:
        what = "is a symbolic link" if error.errno == errno.ELOOP else f"is missing or unreadable ({error.strerror})"
        raise CheckpointError(f"{name} {what} in {path}") from None
