"""Gradients over all ranks: their norm, what clipping does to them, and what the trainability contract reads."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from dist_cpt_kernels import clip, sum_of_squares
from dist_cpt_kernels.dispatch import available

from dist_cpt.optim.optimizer import Clip
from dist_cpt.runtime.collectives import world_size

NORM_ELEMENTS = 1 << 16  # of one fp32 sum of squares


def norm_and_clip(
    grads: Sequence[torch.Tensor], device: torch.device, max_norm: float, replicas: int = 1
) -> tuple[torch.Tensor, Clip]:
    """(Euclidean norm over all tensors of all ranks, fp32 []; how the step clips), on the device, without a host sync.

    Each tensor is counted `replicas` times over the ranks. A norm that is not finite skips the update on every rank.
    """
    total = _sum_of_squares(grads) if grads else torch.zeros((), dtype=torch.float64, device=device)
    if world_size() > 1:
        dist.all_reduce(total)
    norm, factor, skip = clip(total / replicas, max_norm)
    return norm, Clip(factor, skip)


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
