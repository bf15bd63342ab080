"""A folder that is made beside its place and renamed into it whole; what a kill leaves of it is removed later."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from dist_cpt.run_folder.json_files import fsync_path
from dist_cpt.run_folder.names import LOCK


@contextlib.contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """`with staged(folder) as staging:` a new folder that becomes `folder` at the end, and is removed after an error.

    Its maker locks it meanwhile, as an attempt does a run folder.

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
    for staging in folder.parent.glob(f".{glob.escape(folder.name)}.*.tmp"):
        with contextlib.suppress(OSError), (staging / LOCK).open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(staging, ignore_errors=True)
