"""The seam between the training loop and sharding, reduction, clipping and the optimizer step.

The loop passes micro-batches and learning rates; every engine hides its own gradient scaling. The training state
crosses the seam by canonical name (`dist_cpt.training_state`), so that any engine reads what another has written.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from dist_cpt.data.batch import Batch
from dist_cpt.engines.gradients import StepMeans
from dist_cpt.runtime.late_read import LateRead
from dist_cpt.training_state import (
    STATE_KINDS,
    ExportedTensor,
    ExportState,
    OwnerOf,
    ReadingOrder,
    ReadState,
    StateKind,
)


@dataclass(frozen=True)
class StepStats:
    """One optimizer step over all ranks."""

    loss: float  # mean over its target tokens, nats
    grad_norm: float  # before clipping
    skipped: bool  # not finite, or over the spike limit: masters, moments and step counter are unchanged
    routing: tuple[float, ...] = ()  # of a mixture of experts, as `Routing.summary`


class LateStats:
    """A step's statistics on their way from the device, [] each."""

    def __init__(self, means: StepMeans, grad_norm: torch.Tensor, skipped: torch.Tensor) -> None:
        values = torch.stack([value.double() for value in (means.loss, grad_norm, skipped)])
        self._copy = LateRead(values if means.routing is None else torch.cat([values, means.routing]))
        self.arrived = self._copy.arrived  # the end of the step

    def read(self) -> StepStats:
        """Wait for the step to end, if it has not."""
        loss, grad_norm, skipped, *routing = self._copy.read()
        return StepStats(loss, grad_norm, bool(skipped), tuple(routing))


class Engine(Protocol):
    """One training state on all ranks. Every method is collective: all ranks call it in the same order."""

    kind: str  # as in the recipe and in manifests: "single", "fsdp-full", "zero-3" ...

    def accumulate(self, batch: Batch, num_tokens: int, last: bool) -> None:
        """Forward and backward of one micro-batch, without a host sync.

        `num_tokens` are the target tokens of the whole optimizer step, over all ranks and micro-batches: `step`
        sees the gradient of (sum of token losses) / num_tokens. `last` marks the step's last micro-batch.
        """
        ...

    def step(self, lrs: Mapping[str, float], spike_limit: float = math.inf) -> LateStats:
        """Clip by the global norm, update with `lrs` (learning rate by group name), and drop the gradients.

        The update is skipped, on all ranks, if the loss or the gradient is not finite on any, or if the mean loss over
        all target tokens exceeds `spike_limit`: decided on the device, and read later.
        """
        ...

    def evaluate(self, batch: Batch) -> torch.Tensor:
        """The local loss sum without gradients or dropout, fp32 [], detached."""
        ...

    def logits(self, input_ids: torch.Tensor) -> torch.Tensor:
        """fp32 logits [1, V] after the last of `input_ids` [1, L]; same input and same result on every rank."""
        ...

    def export_state(self, owner_of: OwnerOf, kinds: Sequence[StateKind] = STATE_KINDS) -> Iterator[ExportedTensor]:
        """Yield every trainable tensor's `kinds`, in the groups' order, whole on its owner's CPU."""
        ...

    def snapshot(self) -> ExportState:
        """Copy this rank's part of the state to the CPU; the result exports the copies, on any thread.

        The next snapshot overwrites the copies, so only one may be in use.
        """
        ...

    def import_state(self, read: ReadState, step: int, order: ReadingOrder | None = None) -> None:
        """Replace masters, moments and the optimizer's step counter, and refresh the compute copies.

        Without `order` every rank reads its own parts; with it, one rank reads each tensor for all. Collective.
        """
        ...

    def close(self) -> None:
        """Release the engine's resources; the process group stays."""
        ...


class InspectableEngine(Engine, Protocol):
    """What only checks and measurements read."""

    def gradient_probe(self) -> dict[str, tuple[float, float]]:
        """(norm, max abs) of the gradient that `step` would apply, by canonical name, global over ranks.

        Valid between `accumulate(..., last=True)` and `step`; non-finite values are returned, not raised.
        """
        ...

    def frozen_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, this rank's storage between steps) of every tensor that does not train."""
        ...

    def sharded_bytes(self) -> dict[str, int]:
        """Bytes of this rank's storages between steps: `trainable` (compute copies), `frozen`, `optimizer` (masters
        and moments)."""
        ...
