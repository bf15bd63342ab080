"""Does a checkpoint hold what its manifest says, and is what was restored what had been saved?"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from dist_cpt.checkpoint.quick_check import outline_problems
from dist_cpt.checkpoint.safetensors_stream import file_sha256, scan, tensor_sha256
from dist_cpt.errors import CheckpointError
from dist_cpt.run_folder.checkpoints import published, read_manifest
from dist_cpt.run_folder.manifest import Manifest, TensorEntry
from dist_cpt.run_folder.names import INITIAL_ADAPTER
from dist_cpt.runtime.collectives import broadcast_json, gather_json, rank, world_size
from dist_cpt.training_state import STATE_KINDS, StateKind


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


def model_problems(path: Path) -> list[str]:
    """As `verify_checkpoint`, but without reading the optimizer's files: enough to use the model."""
    problems = outline_problems(path)
    if problems:
        return problems
    manifest = read_manifest(path)
    used = [name for name in manifest.files if not name.startswith("optimizer-")]
    return [problem for name in used for problem in file_problems(path, manifest, name)]


def verify_run(run_folder: Path) -> dict[str, list[str]]:
    """The problems of every published checkpoint of a run by folder name, newest first.

    Raises:
        CheckpointError: there are none.
    """
    found = published(run_folder)
    if not found:
        raise CheckpointError(f"no checkpoints in {run_folder}", remedy="give a run folder or a checkpoint folder")
    verdicts = {path: verify_checkpoint(path) for path in found}
    # A run that goes on may have pruned one meanwhile.
    return {path.name: problems for path, problems in verdicts.items() if not problems or path.exists()}


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


def file_problems(path: Path, manifest: Manifest, name: str) -> list[str]:
    """Read one listed file to its end and compare: bytes, sha256, and for tensor files every tensor."""
    entry = manifest.files[name]
    try:
        if not name.endswith(".safetensors") or name == INITIAL_ADAPTER:
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
    approximate: Callable[[StateKind, str, torch.Tensor], bool] | None = None,
) -> dict[str, Any]:
    """The content of certificate.json: proof that the restored run is the saved one. Collective.

    `exported` is the engine's state after its import, with any owners. Each tensor is hashed where it lies
    and compared with the manifest. Losses are in nats per token and may differ by `tolerance`. `facts` are further
    (recorded, restored) pairs that must be equal. `approximate` is asked about a tensor whose hash differs whether
    it may, because it is kept in fewer bits here; the check says how many did. The verdict is `pass` or `fail`;
    `failed` names the checks.
    """
    hashes: dict[StateKind, dict[str, str]] = {kind: {} for kind in STATE_KINDS}
    order: dict[str, None] = {}
    saved = {tensor.name: tensor.sha256 for tensor in manifest.tensors}
    close: dict[StateKind, int] = dict.fromkeys(STATE_KINDS, 0)
    for tensor in exported:
        order[tensor.name] = None
        if tensor.values is None:
            continue
        sha256 = tensor_sha256(tensor.values)
        expected = saved.get(tensor.name, {}).get(tensor.kind)
        if expected is not None and sha256 != expected and approximate is not None:
            near = approximate(tensor.kind, tensor.name, tensor.values)
            sha256 = expected if near else sha256
            close[tensor.kind] += near
        hashes[tensor.kind][tensor.name] = sha256
    shares = gather_json([hashes, close])
    checks = [_names_check(manifest, list(order))]
    for kind in STATE_KINDS:
        merged = {name: sha256 for share, _ in shares for name, sha256 in share[kind].items()}
        checks.append(_hash_check(manifest, kind, merged, sum(near[kind] for _, near in shares)))
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


def _hash_check(manifest: Manifest, kind: StateKind, restored: dict[str, str], close: int) -> dict[str, Any]:
    wrong = [tensor.name for tensor in manifest.tensors if restored.get(tensor.name) != tensor.sha256[kind]]
    total = len(manifest.tensors)
    detail = f"{total - close} of {total} bit-identical" + (f", {close} within a step of 8 bit" if close else "")
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
