"""Does a checkpoint hold what its manifest says, and is what was restored what had been saved?"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from dist_cpt.checkpoint.folders import published, step_name
from dist_cpt.checkpoint.manifest import (
    ADAPTER_WEIGHTS,
    MANIFEST,
    MODEL_INDEX,
    STATE,
    STATE_KINDS,
    Manifest,
    StateKind,
    TensorEntry,
    manifest_from_bytes,
    state_digest,
)
from dist_cpt.checkpoint.safetensors_stream import file_sha256, scan, tensor_sha256
from dist_cpt.checkpoint.state import TrainState, state_from_bytes
from dist_cpt.errors import CheckpointError
from dist_cpt.runtime.collectives import broadcast_json, gather_json, rank, world_size

# First bytes of a pickle (protocols 2 to 5) and of torch's zip archive around one.
_PICKLES = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK\x03\x04")


class Exported(Protocol):
    """One tensor of the training state as an engine hands it over; `values` is fp32 on its owner's CPU."""

    @property
    def kind(self) -> StateKind: ...
    @property
    def name(self) -> str: ...
    @property
    def values(self) -> torch.Tensor | None: ...


def verify_checkpoint(path: Path) -> list[str]:
    """Every way in which a checkpoint folder differs from its manifest; empty when every byte holds."""
    problems = outline_problems(path)
    if problems:
        return problems
    manifest = read_manifest(path)
    return [problem for name in manifest.files for problem in file_problems(path, manifest, name)]


def verify_run(run_folder: Path) -> dict[str, list[str]]:
    """The problems of every published checkpoint of a run by folder name, newest first.

    Raises:
        CheckpointError: there are none.
    """
    found = published(run_folder)
    if not found:
        raise CheckpointError(f"no checkpoints in {run_folder}", remedy="give a run folder or a checkpoint folder")
    return {path.name: verify_checkpoint(path) for path in found}


def verify_together(path: Path) -> list[str]:
    """`verify_checkpoint` with the files spread over all ranks; the same answer on every rank."""
    problems: list[str] = broadcast_json(outline_problems(path) if rank() == 0 else None)
    if problems:
        return problems
    try:
        manifest = read_manifest(path)
        largest_first = sorted(manifest.files, key=lambda name: (-manifest.files[name].num_bytes, name))
        mine = largest_first[rank() :: world_size()]
        found = [problem for name in mine for problem in file_problems(path, manifest, name)]
    except CheckpointError as error:  # rank 0 could read it a moment ago
        found = [f"rank {rank()}: {error.message}"]
    return [problem for share in gather_json(found) for problem in share]


def outline_problems(path: Path) -> list[str]:
    """What can be seen without reading the tensors: the manifest, names, sizes, extra or missing files."""
    try:
        manifest = read_manifest(path)
    except CheckpointError as error:
        return [error.message]
    problems = _structure_problems(manifest)
    if path.name.split(".")[0] != step_name(manifest.step):
        problems.append(f"{MANIFEST} is of step {manifest.step}, but the folder is {path.name}")
    for name, entry in manifest.files.items():
        problems += _size_problems(path, name, entry.num_bytes)
    for name in sorted(_files_below(path) - manifest.files.keys() - {MANIFEST}):
        problems.append(f"{name} is not in {MANIFEST}")
    if not problems:
        problems += _state_problems(path, manifest)
        problems += [f"{name} looks like a pickle" for name in manifest.files if _looks_like_a_pickle(path / name)]
    return problems


def file_problems(path: Path, manifest: Manifest, name: str) -> list[str]:
    """Read one listed file to its end and compare: bytes, sha256, and for tensor files every tensor."""
    entry = manifest.files[name]
    try:
        if not name.endswith(".safetensors"):
            num_bytes, sha256 = file_sha256(path / name)
            problems = []
        else:
            found = scan(path / name)
            num_bytes, sha256 = found.num_bytes, found.sha256
            problems = []
            expected = _expected_tensors(manifest, name)
            for key in sorted(expected.keys() ^ found.tensors.keys()):
                problems.append(f"{name}: {'lacks' if key in expected else 'has the unexpected'} tensor {key}")
            for key in sorted(expected.keys() & found.tensors.keys()):
                shape, tensor_hash = expected[key]
                tensor = found.tensors[key]
                if tensor.shape != shape:
                    problems.append(f"{name}: {key} has shape {list(tensor.shape)}, expected {list(shape)}")
                if not tensor.finite:
                    problems.append(f"{name}: {key} holds values that are not finite")
                if tensor.sha256 != tensor_hash:
                    problems.append(f"{name}: {key} does not have the sha256 of the manifest")
    except CheckpointError as error:
        return [error.message]
    except OSError as error:
        return [f"{name}: cannot be read ({error.strerror})"]
    if (num_bytes, sha256) != (entry.num_bytes, entry.sha256):
        problems.append(f"{name}: does not have the sha256 of the manifest")
    return problems


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


def certify(
    manifest: Manifest,
    exported: Iterable[Exported],
    *,
    next_block_ids: Sequence[int],
    recorded_block_ids: Sequence[int],
    replayed_loss: float,
    recorded_loss: float,
    tolerance: float,
    facts: Mapping[str, tuple[Any, Any]] | None = None,
) -> dict[str, Any]:
    """The content of certificate.json: proof that the restored run is the saved one. Collective.

    `exported` is the engine's state after its import, with any owners. Each tensor is hashed where it lies
    and compared with the manifest. Losses are in nats per token and may differ by `tolerance`. `facts` are
    further (recorded, restored) pairs that must be equal. The verdict is `pass` or `fail`; `failed` names
    the checks.
    """
    hashes: dict[StateKind, dict[str, str]] = {kind: {} for kind in STATE_KINDS}
    order: dict[str, None] = {}
    for tensor in exported:
        order[tensor.name] = None
        if tensor.values is not None:
            hashes[tensor.kind][tensor.name] = tensor_sha256(tensor.values)
    shares = gather_json(hashes)
    checks = [_names_check(manifest, list(order))]
    for kind in STATE_KINDS:
        merged = {name: sha256 for share in shares for name, sha256 in share[kind].items()}
        checks.append(_hash_check(manifest, kind, merged))
    checks.append(_equal_check("next_block_ids", list(recorded_block_ids), list(next_block_ids)))
    checks += [_equal_check(name, *pair) for name, pair in (facts or {}).items()]
    checks.append(_loss_check(recorded_loss, replayed_loss, tolerance))
    failed = [check["name"] for check in checks if not check["passed"]]
    return {
        "verdict": "fail" if failed else "pass",
        "failed": failed,
        "step": manifest.step,
        "state_sha256": manifest.state_sha256,
        "saved_by": {"engine": manifest.engine, "world_size": manifest.world_size},
        "checks": checks,
    }


def _names_check(manifest: Manifest, order: list[str]) -> dict[str, Any]:
    missing = sorted(set(manifest.names()) - set(order))
    extra = sorted(set(order) - set(manifest.names()))
    detail = f"{len(order)} tensors"
    if missing or extra:
        detail = f"missing {missing[:3]}, unexpected {extra[:3]} ({len(missing)} and {len(extra)} in all)"
    elif order != manifest.names():
        detail = "the same names in another order"
    return {"name": "trainable_names", "passed": order == manifest.names(), "detail": detail}


def _hash_check(manifest: Manifest, kind: StateKind, restored: dict[str, str]) -> dict[str, Any]:
    wrong = [tensor.name for tensor in manifest.tensors if restored.get(tensor.name) != tensor.sha256[kind]]
    total = len(manifest.tensors)
    detail = f"{total} of {total} bit-identical"
    if wrong:
        detail = f"{len(wrong)} of {total} differ, first {wrong[0]}"
    return {"name": kind, "passed": not wrong, "detail": detail}


def _equal_check(name: str, recorded: Any, restored: Any) -> dict[str, Any]:
    passed = recorded == restored
    if isinstance(recorded, list) and len(recorded) > 8:
        detail = f"{len(recorded)} values" + ("" if passed else f", recorded {recorded[:4]}..., got {restored[:4]}...")
    else:
        detail = f"{recorded}" if passed else f"recorded {recorded}, got {restored}"
    return {"name": name, "passed": passed, "detail": detail}


def _loss_check(recorded: float, replayed: float, tolerance: float) -> dict[str, Any]:
    difference = abs(replayed - recorded)
    detail = f"recorded {recorded!r}, replayed {replayed!r}, difference {difference:.3g}, allowed {tolerance:g}"
    # Written so that a NaN fails.
    return {"name": "replayed_loss", "passed": difference <= tolerance, "detail": detail}


def _structure_problems(manifest: Manifest) -> list[str]:
    """Whether the manifest is complete in itself."""
    problems = []
    names = manifest.names()
    if not names:
        problems.append(f"{MANIFEST} lists no tensors")
    problems += [f"{MANIFEST} lists tensor {name} twice" for name in {n for n in names if names.count(n) > 1}]
    needed = [STATE, *([ADAPTER_WEIGHTS, "adapter_config.json"] if manifest.adapter else [MODEL_INDEX, "config.json"])]
    problems += [f"{MANIFEST} lists no {name}" for name in needed if name not in manifest.files]
    for tensor in manifest.tensors:
        for kind in STATE_KINDS:
            if kind not in tensor.sha256 or tensor.file.get(kind) not in manifest.files:
                problems.append(f"{MANIFEST} lists no file for {kind}.{tensor.name}")
    for alias, name in manifest.aliases.items():
        if name not in names:
            problems.append(f"{MANIFEST}: {alias} is an alias of {name}, which is not listed")
    if len(set(names)) == len(names):
        listed = {name for tensor in manifest.tensors for name in tensor.file.values()}
        stray = {name for name in manifest.files if name.endswith(".safetensors")} - listed
        problems += [f"{MANIFEST} lists {name} without a tensor in it" for name in sorted(stray)]
    return problems


def _size_problems(path: Path, name: str, num_bytes: int) -> list[str]:
    file = path / name
    parents = [path.joinpath(*Path(name).parts[:depth]) for depth in range(1, len(Path(name).parts))]
    if any(part.is_symlink() for part in (*parents, file)):
        return [f"{name} is a symbolic link"]
    if not file.exists():
        return [f"{name} is missing"]
    if not file.is_file():
        return [f"{name} is not a regular file"]
    size = file.stat().st_size
    return [] if size == num_bytes else [f"{name} has {size} bytes, expected {num_bytes}"]


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
    with open(file, "rb") as opened:
        return opened.read(4).startswith(_PICKLES)


def _expected_tensors(manifest: Manifest, file_name: str) -> dict[str, tuple[tuple[int, ...], str]]:
    """Key -> (shape, sha256) of every tensor that belongs into this file."""
    expected: dict[str, tuple[tuple[int, ...], str]] = {}
    by_name: dict[str, TensorEntry] = {}
    for tensor in manifest.tensors:
        by_name[tensor.name] = tensor
        for kind in STATE_KINDS:
            if tensor.file[kind] == file_name:
                key = tensor.name if kind == "master" else f"{kind}.{tensor.name}"
                expected[key] = (tensor.shape, tensor.sha256[kind])
    for alias, name in manifest.aliases.items():
        if by_name[name].file["master"] == file_name:
            expected[alias] = (by_name[name].shape, by_name[name].sha256["master"])
    return expected


def _files_below(path: Path) -> set[str]:
    """Relative names of everything that is not a plain folder; links count, and are not followed."""
    found = set()
    for folder, folders, files in os.walk(path):
        here = Path(folder)
        links = [name for name in folders if (here / name).is_symlink()]
        # .nfs*: what an NFS client leaves of a deleted file that is still open somewhere.
        names = [name for name in (*files, *links) if not name.startswith(".nfs")]
        found |= {(here / name).relative_to(path).as_posix() for name in names}
    return found


def _read_small(path: Path, name: str) -> bytes:
    file = path / name
    if path.is_symlink() or file.is_symlink():
        raise CheckpointError(f"{file} is a symbolic link")
    try:
        return file.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{name} is missing or unreadable in {path} ({error.strerror})") from None
