"""Every byte of a checkpoint against the sha256 of its files in the manifest, without torch."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from dist_cpt.checkpoint.quick_check import quick_check
from dist_cpt.errors import CheckpointError
from dist_cpt.run_folder.checkpoints import read_manifest
from dist_cpt.runtime.liveness import made_progress
from dist_cpt.storage import PatientFile

CHUNK_BYTES = 2 * 2**20


def wrong_files(checkpoint: Path) -> list[str]:
    """Every way in which the files differ from the manifest; that of each tensor is left to `verify_checkpoint`.

    Raises:
        StorageError: the file system does not answer.
    """
    if problems := quick_check(checkpoint):
        return problems
    for name, entry in read_manifest(checkpoint).files.items():
        try:
            if file_sha256(checkpoint / name) != (entry.num_bytes, entry.sha256):
                problems.append(f"{name}: does not have the sha256 of the manifest")
        except CheckpointError as error:
            problems.append(error.message)
    return problems


def file_sha256(path: Path) -> tuple[int, str]:
    """Bytes and sha256 of a regular file.

    Raises:
        CheckpointError: it cannot be opened.
        StorageError: the file system does not answer.
    """
    digest, size = hashlib.sha256(), 0
    with open_file(path) as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            size += len(chunk)
            made_progress()
    return size, digest.hexdigest()


def open_file(path: Path) -> PatientFile:
    """Open for reading; never through a symbolic link, never a device or pipe; errors as `file_sha256`."""
    try:
        return PatientFile(path, os.O_NOFOLLOW, expected=True)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be opened ({error.strerror})") from None
