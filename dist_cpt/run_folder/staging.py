"""Folders and files that are made beside their place, and renamed into it when they are complete."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from dist_cpt.errors import ConfigError, WriteError
from dist_cpt.run_folder.json_files import fsync_path
from dist_cpt.run_folder.names import LOCK


@contextlib.contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """A new run folder to fill, which becomes `folder` at the end, and is removed after an error.

    Its maker locks it meanwhile, as an attempt does a run folder; what a kill leaves of it is removed later.

    Raises:
        OSError: it cannot be made or renamed.
    """
    remove_abandoned(folder)
    staging = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.tmp")
    try:
        staging.mkdir(parents=True)
        with (staging / LOCK).open("a") as lock:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield staging
            os.rename(staging, folder)
        fsync_path(folder.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def remove_abandoned(folder: Path) -> None:
    """Remove what was staged for `folder` by processes that were killed; nothing where that cannot be told."""
    with contextlib.suppress(OSError):  # the folder cannot be listed
        for staging in folder.parent.glob(f".{glob.escape(folder.name)}.*.tmp"):
            with contextlib.suppress(OSError), (staging / LOCK).open("a") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(staging, ignore_errors=True)


def require_new(out: Path) -> None:
    """Refuse an output that would replace something.

    Raises:
        ConfigError: `out` is a file or a folder that is not empty.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists", remedy="give --out a new name")


@contextlib.contextmanager
def new_output(out: Path) -> Iterator[Path]:
    """A path inside a temporary folder beside `out`; the file or folder that the body makes there becomes `out`.

    Raises:
        WriteError: it cannot be written.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent, ignore_cleanup_errors=True) as work:
            yield Path(work) / out.name
            os.replace(Path(work) / out.name, out)  # an empty folder at `out` is replaced
        fsync_path(out.parent)
    except OSError as error:
        why = error.strerror or error
        raise WriteError(f"{out} cannot be written: {why}", remedy="free space, or give another --out") from error
