"""The checkpoint folders of a run: their names, which are published, their manifest and state."""

from __future__ import annotations

import errno
import re
import secrets
from pathlib import Path

from dist_cpt.errors import CheckpointError, WriteError
from dist_cpt.run_folder.manifest import Manifest, manifest_from_bytes
from dist_cpt.run_folder.names import CHECKPOINTS, MANIFEST, STATE, SUPERSEDED
from dist_cpt.run_folder.train_state import TrainState, state_from_bytes

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
    """Published checkpoint folders, newest step first, valid or not."""
    return _numbered(checkpoints_folder(run_folder), _STEP_NAME)


def superseded(run_folder: Path) -> list[Path]:
    """Checkpoints that were moved aside, newest step first."""
    return _numbered(superseded_folder(run_folder), _SUPERSEDED_NAME)


def write_error(error: Exception, run_folder: Path, step: int) -> WriteError:
    """The error for a save that the file system refused."""
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
    numbered = []
    for path in folder.iterdir():
        match = pattern.fullmatch(path.name)
        if match and path.suffix != ".tmp" and path.is_dir() and not path.is_symlink():
            numbered.append((int(match[1]), path.name, path))
    return [path for *_, path in sorted(numbered, reverse=True)]


def read_manifest(path: Path) -> Manifest:
    """The manifest of a checkpoint folder.

    Raises:
        CheckpointError: missing or damaged.
    """
    return manifest_from_bytes(_read_small(path, MANIFEST))


def read_state(path: Path) -> TrainState:
    """The training state of a checkpoint folder.

    Raises:
        CheckpointError: missing or damaged.
    """
    return state_from_bytes(_read_small(path, STATE))


def _read_small(path: Path, name: str) -> bytes:
    file = path / name
    if path.is_symlink() or file.is_symlink():
        raise CheckpointError(f"{file} is a symbolic link")
    try:
        if file.exists() and not file.is_file():
            raise CheckpointError(f"{file} is not a regular file")
        return file.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{name} is missing or unreadable in {path} ({error.strerror})") from None
