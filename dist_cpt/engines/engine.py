"""The seam between the loop and whoever owns sharding, reduction, clipping and the optimizer step.

The loop hands over micro-batches and learning rates; every engine hides its own gradient scaling. The
training state crosses this seam by canonical name, as flat fp32 values on the CPU, one tensor at a time,
so that any engine at any world size can read what another has written.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from dist_cpt.data.batch import Batch
from dist_cpt.training_state import STATE_KINDS, ExportedTensor, ExportState, OwnerOf, ReadState, StateKind


@dataclass(frozen=True)
class GradStats:
    """What one optimizer step did: the global gradient norm before clipping, and whether it was skipped."""

    grad_norm: float
    skipped: bool  # non-finite on some rank: nothing moved, moments and step counter as before


class Engine(Protocol):
    """One training state on all ranks. Every method is collective: all ranks call it in the same order."""

    kind: str  # as in the recipe and in manifests: "single", "fsdp-full", "zero-3" ...

    def accumulate(self, batch: Batch, num_tokens: int, last: bool) -> torch.Tensor:
        """Forward and backward of one micro-batch.

        `num_tokens` is the number of target tokens of the whole optimizer step over all ranks and
        micro-batches; the gradient that `step` sees is that of (sum of token losses) / num_tokens.
        `last` marks the last micro-batch of the step. Returns the local loss sum, fp32, detached, on the
        device, without a host sync.
        """
        ...

    def step(self, lrs: Mapping[str, float]) -> GradStats:
        """Clip by the global norm and update with `lrs` (learning rate by group name); then zero gradients.

        A gradient that is not finite on any rank skips the update on all of them.
        """
        ...

    def evaluate(self, batch: Batch) -> torch.Tensor:
        """Local loss sum of a micro-batch without gradients, dropout off; fp32, detached."""
        ...

    def logits(self, input_ids: torch.Tensor) -> torch.Tensor:
        """fp32 logits [1, V] after the last of `input_ids` [1, L]; same input and same result on every rank."""
        ...

    def discard(self) -> None:
        """Drop the accumulated gradients: a step whose update is not wanted. Nothing moves, nothing counts."""
        ...

    def export_state(self, owner_of: OwnerOf, kinds: Sequence[StateKind] = STATE_KINDS) -> Iterator[ExportedTensor]:
        """Yield every trainable tensor's `kinds`, in the groups' order, whole on its owner."""
        ...

    def snapshot(self) -> ExportState:
        """Copy this rank's part of the state to the CPU; the result exports the copies, also on another thread.

        At most one snapshot is in use at a time: the next one overwrites its copies.
        """
        ...

    def import_state(self, read: ReadState, step: int) -> None:
        """Replace masters, moments and the optimizer's step counter, and refresh every compute copy."""
        ...

    def gradient_probe(self) -> dict[str, tuple[float, float]]:
        """(norm, max abs) of the gradient last given to `step`, by canonical name, global over ranks.

        Valid after `accumulate(..., last=True)` and before `step`. Raises nothing on non-finite values.
        """
        ...

    def frozen_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, local storage) of every tensor that does not train, as this rank holds it between steps."""
        ...

    def sharded_bytes(self) -> dict[str, int]:
        """Bytes of persistent tensors this rank holds: `trainable` (compute copies), `frozen`, `optimizer`
        (masters and moments); measured from the tensors' local storages."""
        ...

    def close(self) -> None:
        """Release what the engine holds; the process group stays."""
        ...
