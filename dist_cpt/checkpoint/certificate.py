"""The resume certificate: evidence that the restored run is the saved one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dist_cpt.checkpoint.safetensors_stream import tensor_sha256
from dist_cpt.run_folder.manifest import Manifest
from dist_cpt.runtime.collectives import broadcast_json, gather_json_to_rank_zero
from dist_cpt.training_state import STATE_KINDS, ExportedTensor, StateKind

Tolerates = Callable[[StateKind, str, torch.Tensor], bool]


@dataclass(frozen=True)
class ReplayedLoss:
    """The loss of one recorded batch when it was saved and now, in nats per token; may differ by `tolerance`."""

    recorded: float
    replayed: float
    tolerance: float


def certify(
    manifest: Manifest,
    exported: Iterable[ExportedTensor],
    facts: Mapping[str, tuple[Any, Any]],
    loss: ReplayedLoss,
    tolerates: Tolerates | None = None,
) -> dict[str, Any]:
    """The content of certificate.json; `verdict` is `pass` or `fail`, `failed` names the checks. Collective.

    `exported` is the engine's state after its import, with any owners; each tensor is hashed where it lies and
    compared with the manifest. `facts` are (recorded, restored) pairs that must be equal. A tensor whose hash
    differs passes if it `tolerates` that, because it is kept in fewer bits here; the check counts those.
    """
    recorded = {tensor.name: tensor.sha256 for tensor in manifest.tensors}
    hashes: dict[StateKind, dict[str, str]] = {kind: {} for kind in STATE_KINDS}
    num_tolerated: dict[StateKind, int] = dict.fromkeys(STATE_KINDS, 0)
    order: dict[str, None] = {}
    for tensor in exported:
        order[tensor.name] = None
        if tensor.values is None:
            continue
        sha256 = tensor_sha256(tensor.values)
        expected = recorded.get(tensor.name, {}).get(tensor.kind, sha256)
        if sha256 != expected and tolerates is not None and tolerates(tensor.kind, tensor.name, tensor.values):
            sha256 = expected
            num_tolerated[tensor.kind] += 1
        hashes[tensor.kind][tensor.name] = sha256
    shares = gather_json_to_rank_zero([hashes, num_tolerated])
    checks = [_names_check(manifest, list(order))]
    checks += broadcast_json(None if shares is None else _hash_checks(manifest, shares))
    checks += [_equal_check(name, *pair) for name, pair in facts.items()]
    checks.append(_loss_check(loss))
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


def _hash_checks(manifest: Manifest, shares: Sequence[Any]) -> list[dict[str, Any]]:
    """One check per kind, from the (hashes, numbers of tolerated tensors) of every rank."""
    checks = []
    for kind in STATE_KINDS:
        restored = {name: sha256 for share, _ in shares for name, sha256 in share[kind].items()}
        checks.append(_hash_check(manifest, kind, restored, sum(counts[kind] for _, counts in shares)))
    return checks


def _hash_check(manifest: Manifest, kind: StateKind, restored: dict[str, str], num_tolerated: int) -> dict[str, Any]:
    wrong = [tensor.name for tensor in manifest.tensors if restored.get(tensor.name) != tensor.sha256[kind]]
    total = len(manifest.tensors)
    detail = f"{total - num_tolerated} of {total} bit-identical"
    if num_tolerated:
        detail += f", {num_tolerated} within a step of 8 bit"
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


def _loss_check(loss: ReplayedLoss) -> dict[str, Any]:
    difference = abs(loss.replayed - loss.recorded)
    detail = (
        f"recorded {loss.recorded!r}, replayed {loss.replayed!r}, "
        f"difference {difference:.3g}, allowed {loss.tolerance:g}"
    )
    # Written so that a NaN fails.
    return {"name": "replayed_loss", "passed": difference <= loss.tolerance, "detail": detail}
