"""A full check of a checkpoint: every byte of every file against the manifest."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

from dist_cpt.checkpoint.byte_check import file_sha256
from dist_cpt.checkpoint.plan_files import files_by_rank
from dist_cpt.checkpoint.quick_check import quick_check
from dist_cpt.checkpoint.safetensors_stream import scan
from dist_cpt.data.store_check import check_store
from dist_cpt.errors import CheckpointError
from dist_cpt.run_folder.checkpoints import published, read_manifest
from dist_cpt.run_folder.manifest import Manifest
from dist_cpt.run_folder.names import NOT_TRAINED
from dist_cpt.runtime.collectives import gather_json, on_every_rank, on_rank_zero, rank, world_size
from dist_cpt.training_state import STATE_KINDS


def verify_checkpoint(path: Path) -> list[str]:
    """Every way in which a checkpoint folder differs from its manifest; empty if it is valid.

    Raises:
        StorageError: the file system does not answer: neither valid nor damaged.
    """
    if problems := quick_check(path):
        return problems
    manifest = read_manifest(path)
    return _file_problems(path, manifest, manifest.files)


def model_problems(path: Path) -> list[str]:
    """As `verify_checkpoint`, without reading the optimizer's files: enough to use the model."""
    if problems := quick_check(path):
        return problems
    manifest = read_manifest(path)
    return _file_problems(path, manifest, [name for name in manifest.files if not name.startswith("optimizer-")])


def verify_run(run_folder: Path) -> dict[str, list[str]]:
    """The problems of every published checkpoint of a run by folder name, newest first.

    Raises:
        CheckpointError: there are none.
    """
    paths = published(run_folder)
    if not paths:
        raise CheckpointError(f"no checkpoints in {run_folder}", remedy="give a run folder or a checkpoint folder")
    problems = {path: verify_checkpoint(path) for path in paths}
    # A running job may have pruned one meanwhile.
    return {path.name: listed for path, listed in problems.items() if not listed or os.path.lexists(path)}


def verify_stores(run_folder: Path) -> dict[str, list[str] | None]:
    """The problems of every token store of a run by folder name, block plans included; None for one that is not here.

    Stores are looked for where the newest readable checkpoint had them, then in a cache beside the run.
    """
    recorded: list[str] = []
    for path in published(run_folder):
        with contextlib.suppress(CheckpointError):
            recorded = read_manifest(path).data.get("stores", [])
            break
    problems: dict[str, list[str] | None] = {}
    for folder in map(Path, recorded):
        beside = run_folder.absolute().parent / folder.parent.name / folder.name
        here = next((place for place in (folder, beside) if place.is_dir()), None)
        problems[folder.name] = None
        if here is not None:
            problems[folder.name] = check_store(here).problems
    return problems


def verify_together(path: Path) -> list[str]:
    """`verify_checkpoint` with the files spread over all ranks; the same result on every rank. Collective."""
    problems: list[str] = on_rank_zero("checkpoint", lambda: quick_check(path))
    if problems:
        return problems

    def check_share() -> list[str]:
        try:
            manifest = read_manifest(path)
        except CheckpointError as error:  # rank 0 could read it a moment ago
            return [f"rank {rank()}: {error.message}"]
        return _file_problems(path, manifest, files_by_rank(manifest, world_size())[rank()])

    return [problem for share in gather_json(on_every_rank("checkpoint", check_share)) for problem in share]


def _file_problems(path: Path, manifest: Manifest, names: Iterable[str]) -> list[str]:
    """Read these files to their end and compare: bytes, sha256, and every tensor of a tensor file."""
    problems: list[str] = []
    expected_of = _expected_tensors(manifest)
    for name in names:
        try:
            if not name.endswith(".safetensors") or name in NOT_TRAINED:
                content = file_sha256(path / name)
            else:
                scanned = scan(path / name)
                content = (scanned.num_bytes, scanned.sha256)
                expected = expected_of[name]
                for key in sorted(expected.keys() ^ scanned.tensors.keys()):
                    problems.append(f"{name}: {'lacks' if key in expected else 'has the unexpected'} tensor {key}")
                for key in sorted(expected.keys() & scanned.tensors.keys()):
                    (shape, sha256), tensor = expected[key], scanned.tensors[key]
                    if tensor.shape != shape:
                        problems.append(f"{name}: {key} has shape {list(tensor.shape)}, expected {list(shape)}")
                    if not tensor.finite:
                        problems.append(f"{name}: {key} has values that are not finite")
                    if tensor.sha256 != sha256:
                        problems.append(f"{name}: {key} does not have the sha256 of the manifest")
        except CheckpointError as error:
            problems.append(error.message)
        except OSError as error:  # removed while it was read
            problems.append(f"{name}: cannot be read ({error.strerror})")
        else:
            if content != (manifest.files[name].num_bytes, manifest.files[name].sha256):
                problems.append(f"{name}: does not have the sha256 of the manifest")
    return problems


def _expected_tensors(manifest: Manifest) -> dict[str, dict[str, tuple[tuple[int, ...], str]]]:
    """Key -> (shape, sha256) of every tensor of each file."""
    expected: dict[str, dict[str, tuple[tuple[int, ...], str]]] = {name: {} for name in manifest.files}
    tensors = {tensor.name: tensor for tensor in manifest.tensors}
    for tensor in manifest.tensors:
        for kind in STATE_KINDS:
            key = tensor.name if kind == "master" else f"{kind}.{tensor.name}"
            expected[tensor.file[kind]][key] = (tensor.shape, tensor.sha256[kind])
    for alias, name in manifest.aliases.items():
        tensor = tensors[name]
        expected[tensor.file["master"]][alias] = (tensor.shape, tensor.sha256["master"])
    return expected
