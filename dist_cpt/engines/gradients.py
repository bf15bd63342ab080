"""A step over all ranks: its loss, the norm of its gradients, whether it is applied, and what the trainability
contract reads."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from dist_cpt_kernels import clip, sum_of_squares
from dist_cpt_kernels.dispatch import available

from dist_cpt.model.routing import Routing
from dist_cpt.optim.optimizer import Clip
from dist_cpt.runtime.collectives import world_size

NORM_ELEMENTS = 1 << 16  # of one fp32 sum of squares


class StepLoss:
    """The loss of one optimizer step on this rank, added up on the device, and with it where its tokens went."""

    def __init__(self, routing: Routing | None = None) -> None:
        self._routing = routing
        self._sum: torch.Tensor | None = None
        self._num_tokens = 0

    def add(self, loss_sum: torch.Tensor, num_tokens: int) -> None:
        """A micro-batch's loss sum, fp32 []; `num_tokens` are the whole step's targets over all ranks."""
        self._sum = loss_sum if self._sum is None else self._sum + loss_sum
        self._num_tokens = num_tokens

    def take(self) -> torch.Tensor:
        """This rank's sums, fp64 [N], to be summed over ranks; the next step begins with nothing."""
        assert self._sum is not None, "a step without a micro-batch"
        loss_sum, self._sum = self._sum.double().view(1), None
        return loss_sum if self._routing is None else torch.cat([loss_sum, self._routing.take()])

    def means(self, sums: torch.Tensor) -> StepMeans:
        """What the sums over all ranks say of the step."""
        routing = None if self._routing is None else self._routing.summary(sums[1:], self._num_tokens)
        return StepMeans(sums[0] / self._num_tokens, routing)


@dataclass(frozen=True)
class StepMeans:
    """Of one step over all ranks, on the device."""

    loss: torch.Tensor  # over its targets, fp64 []
    routing: torch.Tensor | None  # as `Routing.summary`


def judge(
    step_loss: StepLoss, grads: Sequence[torch.Tensor], *, max_norm: float, spike_limit: float, replicas: int = 1
) -> tuple[StepMeans, torch.Tensor, Clip]:
    """(the step's means; Euclidean norm of the gradients, fp32 []; how the step clips), all on the device.

    Over all tensors and ranks, with one collective and no host sync. Each tensor is counted `replicas` times. The step
    is skipped on every rank if loss or norm is not finite, or the loss above `spike_limit`.
    """
    own = step_loss.take()
    squares = _sum_of_squares(grads).view(1).to(own.device) if grads else torch.zeros_like(own[:1])
    sums = torch.cat([squares, own])
    if world_size() > 1:
        dist.all_reduce(sums)
    means = step_loss.means(sums[1:])
    norm, factor, skip = clip(sums[0] / replicas, max_norm)
    return means, norm, Clip(factor, torch.where(is_bad(means.loss, spike_limit), 1.0, skip))


def is_bad(loss: torch.Tensor, spike_limit: float) -> torch.Tensor:
    """Whether an fp64 loss is not finite or above the limit, bool [], on its device."""
    return ~(loss.abs() <= min(spike_limit, sys.float_info.max))


def probe(
    grads: Mapping[str, torch.Tensor | None], device: torch.device, replicas: int = 1
) -> dict[str, tuple[float, float]]:
    """(norm, max abs) by name over all ranks; a NaN gives norm NaN and max infinity. Collective."""
    nothing = torch.zeros(0, device=device)
    local = [nothing if grad is None else grad for grad in grads.values()]
    squares = torch.stack([_sum_of_squares([grad]).to(device) for grad in local])
    largest = torch.stack([_largest(grad).to(device) for grad in local])
    if world_size() > 1:
        dist.all_reduce(squares)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    norms = (squares / replicas).sqrt().tolist()
    return {name: (norms[i], value) for i, (name, value) in enumerate(zip(grads, largest.tolist(), strict=True))}


def _sum_of_squares(grads: Sequence[torch.Tensor]) -> torch.Tensor:
    """fp64 [] over fp32 norms of slices: one fp32 sum over 2e6 elements on the CPU is 1e-4 too low. No host sync."""
    flat = [grad.detach().reshape(-1) for grad in grads]
    if available(flat[0]):
        return sum_of_squares(flat)
    slices = [piece for grad in flat for piece in grad.split(NORM_ELEMENTS)]
    norms = torch._foreach_norm(slices, 2, dtype=torch.float32)
    return torch.stack(norms).double().square().sum()


def _largest(grad: torch.Tensor) -> torch.Tensor:
    if grad.numel() == 0:
        return torch.zeros((), dtype=torch.float32)
    # MAX reductions may drop a NaN.
    return grad.detach().abs().amax().float().nan_to_num(nan=math.inf, posinf=math.inf)
