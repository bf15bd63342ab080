"""The trainability contract: what trains, at which rate, in which precision, and the check that it does.

Before step 0 the run writes every group to contract.json. Within the first two updates every declared tensor must
have a finite, non-zero gradient and a non-zero moment, and every frozen tensor must be unchanged. (LoRA's A has no
gradient while B is zero, hence two updates.) The update is judged, not the rounded master: a learning rate below an
ulp or decayed to zero ends no healthy run. Rows of rare tokens and experts without tokens are reported at the end. A
group that is frozen at first must be unchanged until its first step, and is watched from there.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from dist_cpt.config.schema import RunConfig
from dist_cpt.engines.engine import InspectableEngine
from dist_cpt.errors import NumericsError
from dist_cpt.optim.groups import ParamGroup, state_dtype
from dist_cpt.run_folder.names import CONTRACT
from dist_cpt.runtime.collectives import gather_json, on_rank_zero
from dist_cpt.runtime.liveness import made_progress
from dist_cpt.train.attempt import RunContext
from dist_cpt.training_state import StateKind, TensorSpec

UPDATES_TO_WATCH = 2


class Contract:
    """Writes contract.json, then watches the first updates; `finished` once every clause was checked."""

    def __init__(
        self,
        context: RunContext,
        engine: InspectableEngine,
        groups: Sequence[ParamGroup],
        specs: Sequence[TensorSpec],
        model_facts: Mapping[str, Any],
    ) -> None:
        world_size = context.env.world_size
        self._engine = engine
        self._claim = context.claim
        self._names = [name for group in groups for name in group.names]
        self._begins = {name: group.frozen_steps + 1 for group in groups for name in group.names}
        self._owner = {name: index % world_size for index, name in enumerate(self._names)}
        self._watched: list[str] | None = None  # whose updates are watched now
        self._without_gradient: set[str] = set()
        self._updates = 0
        self._waiting_before = self._waiting_hashes()
        self._may_wait = {name for name in self._names if _may_wait(name, groups, context.config)}
        self._unreached: set[str] = set()  # those that had no gradient in the watched updates
        self._frozen_before = self._frozen_checksums()
        self.finished = False
        self.content: dict[str, Any] = {
            "engine": engine.kind,
            "world_size": world_size,
            "groups": [_describe(group, specs, context.config, engine.kind, world_size) for group in groups],
            "frozen": self._frozen_summary(),
            **model_facts,
            "checks": [],
        }
        self._write()

    @property
    def watching(self) -> bool:
        """Whether the updates made now are watched: their outcome is read before the next step."""
        return self._watched is not None

    def before_update(self, step: int) -> None:
        """Record the gradients that are about to be applied. Collective."""
        if self.finished:
            return
        if self._watched is None:
            moving = [name for name in self._names if self._begins[name] <= step]
            if self.content["checks"] and len(moving) < len(self._names):
                return  # some are still frozen; those that move have been checked
            self._watched, self._without_gradient, self._updates = moving, set(moving), 0
        probe = self._engine.gradient_probe()
        for name, (norm, _) in probe.items():
            if norm > 0.0 and math.isfinite(norm):
                self._without_gradient.discard(name)
        missing = [name for name in self._names if name not in probe]
        if missing:
            self._break("every declared tensor is in the optimizer", step, missing)

    def after_update(self, step: int, skipped: bool) -> None:
        """Count an update; after the second, check every clause. Collective.

        Raises:
            NumericsError: a declared tensor got no gradient or no moment, or a frozen one changed.
        """
        if self.finished or skipped or self._watched is None:
            return
        self._updates += 1
        if self._updates < UPDATES_TO_WATCH:
            return
        watched, self._watched = self._watched, None
        reached = self._nonzero("exp_avg")
        self._unreached = {name for name in watched if name in self._may_wait and name not in reached}
        frozen_after = self._frozen_checksums()
        changed = sorted(
            name
            for mine in gather_json([n for n, value in self._frozen_before.items() if frozen_after.get(n) != value])
            for name in mine
        )
        count = f"{len(watched)} tensors"
        due = [name for name in watched if name not in self._unreached]
        gradientless = [name for name in due if name in self._without_gradient]
        self._check("every trainable tensor had a finite, non-zero gradient", step, gradientless, count)
        motionless = [name for name in due if name not in reached]
        self._check("every trainable tensor has a non-zero first moment", step, motionless, count)
        waiting = [name for name in self._names if self._begins[name] > step]
        if waiting:
            hashes = self._waiting_hashes()
            early = [name for name in waiting if hashes[name] != self._waiting_before[name]]
            self._check("every trainable tensor that waits is unchanged", step, early, f"{len(waiting)} tensors")
        self._check("every frozen tensor is unchanged", step, sorted(set(changed)), "by checksum")
        self.finished = len(watched) == len(self._names)
        self._write()

    def close(self, step: int) -> None:
        """Record what could not be checked, and tensors that the data did not reach. Collective."""
        if self._unreached:
            never = sorted(self._unreached - self._nonzero("exp_avg_sq"))
            detail = ", ".join(never) or f"{len(self._unreached)} tensors later than update {UPDATES_TO_WATCH}"
            self._record("every trainable tensor was reached by the data", None if never else True, step, detail)
            self._write()
        if not self.finished:
            why = "some groups had not begun" if self.content["checks"] else f"only {self._updates} updates were made"
            self._record("checked over the first two updates", None, step, why)
            self._write()

    def _check(self, clause: str, step: int, offenders: Sequence[str], detail: str) -> None:
        if offenders:
            self._break(clause, step, offenders)
        self._record(clause, True, step, detail)

    def _break(self, clause: str, step: int, offenders: Sequence[str]) -> None:
        shown = ", ".join(offenders[:5]) + (f" and {len(offenders) - 5} more" if len(offenders) > 5 else "")
        self._record(clause, False, step, shown)
        self._write()
        raise NumericsError(
            f'trainability contract broken at step {step}: "{clause}" is not true of {shown}',
            remedy="see contract.json; nothing was saved after this step",
        )

    def _record(self, clause: str, passed: bool | None, step: int, detail: str) -> None:
        self.content["checks"].append({"name": clause, "passed": passed, "step": step, "detail": detail})

    def _nonzero(self, kind: StateKind) -> set[str]:
        """The tensors of which some element of `kind` is not zero, the same on all ranks."""
        exported = self._engine.export_state(lambda kind, name: self._owner[name], kinds=(kind,))
        mine = [tensor.name for tensor in exported if tensor.values is not None and bool(tensor.values.any())]
        return {name for part in gather_json(mine) for name in part}

    def _waiting_hashes(self) -> dict[str, str]:
        """sha256 of every fp32 master that does not train from the first step, by name, the same on all ranks."""
        mine: dict[str, str] = {}
        if all(begin == 1 for begin in self._begins.values()):
            return mine
        for exported in self._engine.export_state(lambda kind, name: self._owner[name], kinds=("master",)):
            if exported.values is not None and self._begins[exported.name] > 1:
                data = exported.values.contiguous().numpy().tobytes()
                mine[exported.name] = hashlib.sha256(data).hexdigest()
        return {name: value for part in gather_json(mine) for name, value in part.items()}

    def _frozen_checksums(self) -> dict[str, int]:
        """This rank's frozen storage, by name."""
        checksums = {}
        for name, tensor in self._engine.frozen_tensors():
            checksums[name] = checksum(tensor)
            made_progress()
        return checksums

    def _frozen_summary(self) -> dict[str, Any]:
        tensors = dict(self._engine.frozen_tensors())
        per_rank = gather_json([len(tensors), sum(t.numel() for t in tensors.values())])
        return {
            "num_tensors": per_rank[0][0],
            "num_parameters_per_rank": [count for _, count in per_rank],
            "dtype": sorted({str(t.dtype).removeprefix("torch.") for t in tensors.values()}),
            "checksum_rank_0": f"{sum(self._frozen_before.values()) % 2**64:016x}",
        }

    def _write(self) -> None:
        on_rank_zero("contract", lambda: self._claim.write(CONTRACT, self.content))


def _may_wait(name: str, groups: Sequence[ParamGroup], config: RunConfig) -> bool:
    """Whether the first updates may pass a tensor by: rows of new, perhaps rare tokens, and experts without tokens."""
    embeddings = {member for group in groups if group.name == "embeddings" for member in group.names}
    return ".experts." in name or (config.embeddings.rows == "new" and name in embeddings)


def _describe(
    group: ParamGroup, specs: Sequence[TensorSpec], config: RunConfig, engine_kind: str, world_size: int
) -> dict[str, Any]:
    """What contract.json records of a group before the first update."""
    tensors = [spec for spec in specs if spec.group == group.name]
    return {
        "name": group.name,
        "num_tensors": len(tensors),
        "num_parameters": sum(math.prod(spec.shape) for spec in tensors),
        "compute_dtype": config.model.compute_dtype,
        "master_dtype": "fp32",
        "state_dtype": state_dtype(group, config.optim),
        "peak_lr": group.peak_lr,
        "weight_decay": group.weight_decay,
        "first_step": group.frozen_steps + 1,
        "sharding": _sharding(engine_kind, world_size),
        "tensors": [{"name": spec.name, "shape": list(spec.shape)} for spec in tensors],
    }


def checksum(tensor: torch.Tensor) -> int:
    """Position-weighted sum of a tensor's bytes modulo 2**64, computed where the tensor lies."""
    if tensor.numel() == 0:
        return 0
    raw = tensor.detach().contiguous().view(torch.uint8).flatten()
    total = 0
    for start in range(0, raw.numel(), 1 << 24):
        piece = raw[start : start + (1 << 24)].to(torch.int64)
        weights = torch.arange(start + 1, start + 1 + piece.numel(), device=piece.device) % 65521 + 1
        total += int((piece * weights).sum())  # host sync, twice per attempt
    return total % 2**64


def _sharding(engine_kind: str, world_size: int) -> str:
    if world_size == 1:
        return "one rank holds everything"
    return {
        "fsdp-full": f"weights, masters and moments over {world_size} ranks",
        "fsdp-hybrid": f"weights, masters and moments over a group of the {world_size} ranks, replicated across groups",
        "fsdp-trainable": f"trainable tensors over {world_size} ranks, frozen base on each",
        "zero-1": f"masters and moments over {world_size} ranks, weights and gradients on each",
        "zero-2": f"masters, moments and gradients over {world_size} ranks, weights on each",
        "zero-3": f"weights, masters and moments over {world_size} ranks",
    }.get(engine_kind, engine_kind)
