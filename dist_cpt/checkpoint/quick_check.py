"""A check of a checkpoint folder that does not read its tensors. Torch-free."""

from __future__ import annotations

import contextlib
import os
import stat
from collections import Counter
from pathlib import Path

from dist_cpt.errors import CheckpointError
from dist_cpt.run_folder.checkpoints import read_manifest, read_state, step_name
from dist_cpt.run_folder.manifest import Manifest, state_digest
from dist_cpt.run_folder.names import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    MANIFEST,
    MODEL_CONFIG,
    MODEL_INDEX,
    NOT_TRAINED,
    STATE,
)
from dist_cpt.storage import patiently, read_bytes
from dist_cpt.training_state import STATE_KINDS

# First bytes of a pickle (protocols 2 to 5) and of torch's zip archive around one.
_PICKLES = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK\x03\x04")


def quick_check(path: Path) -> list[str]:
    """The problems visible without reading tensors: in the manifest, names, sizes, extra or missing files.

    Raises:
        StorageError: the file system does not answer, and nothing is known.
    """
    try:
        return _problems(path, read_manifest(path))
    except CheckpointError as error:
        return [error.message]
    except OSError as error:  # it may be pruned meanwhile
        return [f"{path.name} cannot be read ({error.strerror})"]


def summary(problems: list[str]) -> str:
    """The first problem, and how many more there are."""
    return problems[0] + (f" (and {len(problems) - 1} more)" if len(problems) > 1 else "")


def _problems(path: Path, manifest: Manifest) -> list[str]:
    problems = manifest_problems(manifest)
    if path.name.split(".")[0] != step_name(manifest.step):
        problems.append(f"{MANIFEST} is of step {manifest.step}, but the folder is {path.name}")
    with contextlib.suppress(OSError):  # one wait for all that a cache may hide
        patiently(path, lambda: [(path / name).lstat() for name in manifest.files], expected=True)
    for name, entry in manifest.files.items():
        problems += _size_problems(path, name, entry.num_bytes)
    for name in sorted(patiently(path, lambda: _files_below(path)) - manifest.files.keys() - {MANIFEST}):
        problems.append(f"{name} is not in {MANIFEST}")
    if not problems:
        problems += _state_problems(path, manifest)
        problems += [f"{name} looks like a pickle" for name in manifest.files if _looks_like_a_pickle(path / name)]
    return problems


def manifest_problems(manifest: Manifest) -> list[str]:
    """What is missing in a manifest, doubled, or contradicts itself."""
    problems = []
    names = Counter(manifest.names())
    if not names:
        problems.append(f"{MANIFEST} lists no tensors")
    problems += [f"{MANIFEST} lists tensor {name} twice" for name, count in names.items() if count > 1]
    needed = (STATE, *((ADAPTER_WEIGHTS, ADAPTER_CONFIG) if manifest.adapter else (MODEL_INDEX, MODEL_CONFIG)))
    problems += [f"{MANIFEST} does not list {name}" for name in needed if name not in manifest.files]
    for tensor in manifest.tensors:
        for kind in STATE_KINDS:
            if kind not in tensor.sha256 or tensor.file.get(kind) not in manifest.files:
                problems.append(f"{MANIFEST} lists no file for {kind}.{tensor.name}")
    for alias, name in manifest.aliases.items():
        if name not in names:
            problems.append(f"{MANIFEST}: {alias} is an alias of {name}, which is not listed")
    if len(names) == len(manifest.tensors):
        with_tensors = {name for tensor in manifest.tensors for name in tensor.file.values()} | {*NOT_TRAINED}
        stray = {name for name in manifest.files if name.endswith(".safetensors")} - with_tensors
        problems += [f"{MANIFEST} lists {name} without a tensor in it" for name in sorted(stray)]
    return problems


def _size_problems(path: Path, name: str, num_bytes: int) -> list[str]:
    file = path / name
    try:
        parts = [file, *(folder for folder in file.parents if path in folder.parents)]
        status, *folders = patiently(file, lambda: [part.lstat() for part in parts])
    except OSError:
        return [f"{name} is missing"]
    if any(stat.S_ISLNK(one.st_mode) for one in (*folders, status)):
        return [f"{name} is a symbolic link"]
    if not stat.S_ISREG(status.st_mode):
        return [f"{name} is not a regular file"]
    return [] if status.st_size == num_bytes else [f"{name} has {status.st_size} bytes, expected {num_bytes}"]


def _state_problems(path: Path, manifest: Manifest) -> list[str]:
    try:
        state = read_state(path)
    except CheckpointError as error:
        return [error.message]
    problems = []
    if state.step != manifest.step:
        problems.append(f"{STATE} is of step {state.step}, {MANIFEST} of step {manifest.step}")
    if state_digest(state.step, state.position, manifest.tensors) != manifest.state_sha256:
        problems.append(f"{STATE} and the tensors are not of the same moment")
    return problems


def _looks_like_a_pickle(file: Path) -> bool:
    if file.suffix == ".safetensors":  # starts with a length; its content is checked to the last byte
        return False
    return read_bytes(file, num_bytes=4).startswith(_PICKLES)


def _files_below(path: Path) -> set[str]:
    """Relative names of everything that is not a plain folder; links count, and are not followed."""
    names = set()

    def fail(error: OSError) -> None:
        raise error

    for folder, folders, files in os.walk(path, onerror=fail):
        here = Path(folder)
        links = [name for name in folders if (here / name).is_symlink()]
        # .nfs*: left by an NFS client of a deleted file that is still open.
        present = [name for name in (*files, *links) if not name.startswith(".nfs")]
        names |= {(here / name).relative_to(path).as_posix() for name in present}
    return names
