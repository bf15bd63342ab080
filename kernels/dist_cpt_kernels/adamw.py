"""AdamW over many tensors in one launch, and their gradient norm, without a host sync in between.

The norm, the clip factor and the decision to skip stay on the device. A table of addresses maps each program to a
piece of a tensor.

Squares are summed in fp32 within a piece, and in fp64 and a fixed order over the pieces: the result is
deterministic, and a non-finite gradient gives a non-finite norm.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch

from dist_cpt_kernels import reference
from dist_cpt_kernels.dispatch import available, jit, tl
from dist_cpt_kernels.rounding import rounded

PIECE = 16384  # elements per program
BLOCK = 1024  # elements per iteration: 16 bytes per tensor for each of 256 threads
NORM_BLOCK = 2048  # the same for bf16 only
NUM_WARPS = 8


def adamw_(
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    exp_avgs: Sequence[torch.Tensor],
    exp_avg_sqs: Sequence[torch.Tensor],
    *,
    corrections: tuple[torch.Tensor, torch.Tensor],
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    grad_factor: torch.Tensor,
    skip: torch.Tensor,
    copies: Sequence[torch.Tensor] | None = None,
) -> None:
    """One AdamW update in place of fp32 `params` and moments; `grads` are all fp32 or all bf16.

    `corrections` are `bias_corrections` of this update's number. Gradients are multiplied by `grad_factor` (one fp32
    element on the device). If `skip` (one element on the device) is not zero, nothing is written. `copies`, all of one
    dtype, receive the new params, rounded. All tensors are contiguous.
    Source: Loshchilov and Hutter, Decoupled Weight Decay Regularization, algorithm 2, with bias correction.

    Raises:
        ValueError: lists do not match, or a tensor has an unexpected dtype or is not contiguous.
    """
    lists = [list(params), list(grads), list(exp_avgs), list(exp_avg_sqs), list(copies or ())]
    if not lists[0]:
        return
    _check(lists)
    step_size, denominator = (lr / corrections[0]).float(), corrections[1]
    if not available(lists[0][0]):
        reference.adamw_(
            *lists[:4],
            copies=lists[4],
            step_size=step_size,
            denominator=denominator,
            decay=1 - lr * weight_decay,
            betas=betas,
            eps=eps,
            grad_factor=grad_factor,
            skip=skip,
        )
        return
    launch = _Launch(lists)
    if launch.num_pieces:
        adamw_kernel[(launch.num_pieces,)](
            launch.addresses,
            launch.pieces,
            len(lists[0]),
            lists[1][0],
            lists[4][0] if copies else None,
            grad_factor,
            skip,
            step_size,
            denominator,
            1 - lr * weight_decay,
            1 - betas[0],
            betas[1],
            1 - betas[1],
            eps,
            ALIGNED=launch.aligned,
            PIECE=PIECE,
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
            enable_fp_fusion=False,  # only the explicit fused multiply-adds: the same bits on every GPU
        )


def sum_of_squares(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """fp64 []: the sum of squares over all elements of contiguous bf16 or fp32 `tensors` on one device.

    Deterministic. Non-finite if an element is, or if an fp32 element exceeds 1.8e19.

    Raises:
        ValueError: no tensors, or one is not contiguous.
    """
    if not tensors:
        raise ValueError("tensors: expected at least one, got none")
    if not all(tensor.is_contiguous() for tensor in tensors):
        raise ValueError("tensors: expected contiguous tensors")
    if not available(tensors[0]):
        return reference.sum_of_squares(tensors)
    launches = [
        _Launch([[tensor for tensor in tensors if tensor.dtype == dtype]])
        for dtype in sorted({tensor.dtype for tensor in tensors}, key=str)
    ]
    total = sum(launch.num_pieces for launch in launches)
    device = tensors[0].device
    partial = torch.empty(total, dtype=torch.float32, device=device)
    place = 0
    for launch in launches:
        if launch.num_pieces:
            sum_squares_kernel[(launch.num_pieces,)](
                launch.addresses, launch.pieces, launch.lists[0][0], partial[place:],
                ALIGNED=launch.aligned, PIECE=PIECE, BLOCK=NORM_BLOCK, num_warps=NUM_WARPS,
            )  # fmt: skip
        place += launch.num_pieces
    out = torch.empty((), dtype=torch.float64, device=device)
    add_up_kernel[(1,)](partial, out, total, BLOCK=BLOCK, num_warps=NUM_WARPS)
    return out


def clip(sum_of_squares: torch.Tensor, max_norm: float | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(norm, factor, skip), fp32 [] each, of the global `sum_of_squares`, all on its device.

    factor = min(1, max_norm / (norm + 1e-6)), 1 without a limit; skip is 1 if the norm is not finite.
    """
    norm = sum_of_squares.sqrt()
    factor = torch.ones_like(norm) if max_norm is None else (max_norm / (norm + 1e-6)).clamp_max(1.0)
    return norm.float(), factor.float(), (~norm.isfinite()).float()


def bias_corrections(step: torch.Tensor, betas: tuple[float, float]) -> tuple[torch.Tensor, torch.Tensor]:
    """(1 - beta1^step, sqrt(1 - beta2^step)) of update number `step`, one element from 1: fp64 [] and fp32 [] on its
    device, both computed in fp64."""
    exponent = step.reshape(()).double()
    return 1 - betas[0] ** exponent, (1 - betas[1] ** exponent).sqrt().float()


def _check(lists: list[list[torch.Tensor]]) -> None:
    params, grads, exp_avgs, exp_avg_sqs, copies = lists
    named = {"params": params, "grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    if copies:
        named["copies"] = copies
    for name, tensors in named.items():
        if [tensor.numel() for tensor in tensors] != [tensor.numel() for tensor in params]:
            raise ValueError(f"{name}: expected tensors with as many elements as params")
        if not all(tensor.is_contiguous() for tensor in tensors):
            raise ValueError(f"{name}: expected contiguous tensors")
        dtypes = {tensor.dtype for tensor in tensors}
        if len(dtypes) > 1 or (name in ("params", "exp_avgs", "exp_avg_sqs") and dtypes != {torch.float32}):
            raise ValueError(f"{name}: expected one dtype, fp32 for params and moments, got {sorted(map(str, dtypes))}")


class _Launch:
    """The work of each program: addresses int64 [lists, tensors], pieces int64 [P, 3] (tensor, start, count)."""

    def __init__(self, lists: list[list[torch.Tensor]]) -> None:
        self.lists = lists
        device = lists[0][0].device
        addresses = tuple(tensor.data_ptr() for tensors in lists for tensor in tensors)
        self.aligned = all(address % 16 == 0 for address in addresses)
        self.addresses = _on_device(addresses, device)
        self.pieces = _pieces(tuple(tensor.numel() for tensor in lists[0]), device)
        self.num_pieces = len(self.pieces)


@lru_cache(maxsize=64)
def _on_device(numbers: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """int64 on `device`, through pinned memory: a copy from pageable memory is a host sync."""
    table = torch.tensor(numbers, dtype=torch.int64)
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table


@lru_cache(maxsize=64)
def _pieces(sizes: tuple[int, ...], device: torch.device) -> torch.Tensor:
    flat = [
        number
        for tensor, size in enumerate(sizes)
        for start in range(0, size, PIECE)
        for number in (tensor, start, min(PIECE, size - start))
    ]
    return _on_device(tuple(flat), device).view(-1, 3)


@jit
def adamw_kernel(
    addresses_ptr, pieces_ptr, num_tensors, grad_like, copy_like, grad_factor_ptr, skip_ptr, step_size_ptr,
    denominator_ptr, decay, weight1, beta2, weight2, eps,
    ALIGNED: tl.constexpr, PIECE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program updates one piece; `*_like` give a dtype, and without `copy_like` there are no copies."""
    if tl.load(skip_ptr) != 0:
        return
    factor, step_size, denominator = tl.load(grad_factor_ptr), tl.load(step_size_ptr), tl.load(denominator_ptr)
    tensor, start, count = _piece(pieces_ptr)
    param = _address(addresses_ptr + tensor, start, tl.pointer_type(tl.float32), ALIGNED)
    grad = _address(addresses_ptr + num_tensors + tensor, start, grad_like.dtype, ALIGNED)
    exp_avg = _address(addresses_ptr + 2 * num_tensors + tensor, start, tl.pointer_type(tl.float32), ALIGNED)
    exp_avg_sq = _address(addresses_ptr + 3 * num_tensors + tensor, start, tl.pointer_type(tl.float32), ALIGNED)
    copy = None
    if copy_like is not None:
        copy = _address(addresses_ptr + 4 * num_tensors + tensor, start, copy_like.dtype, ALIGNED)
    whole = tl.where(count == PIECE, count, 0)  # without masks, loads are vectorised
    for first in range(0, whole, BLOCK):
        index = first + tl.arange(0, BLOCK)
        _update(
            param, grad, exp_avg, exp_avg_sq, copy, index, None,
            factor, step_size, denominator, decay, weight1, beta2, weight2, eps,
        )  # fmt: skip
    for first in range(whole, count, BLOCK):
        index = first + tl.arange(0, BLOCK)
        _update(
            param, grad, exp_avg, exp_avg_sq, copy, index, index < count,
            factor, step_size, denominator, decay, weight1, beta2, weight2, eps,
        )  # fmt: skip


@jit
def _piece(pieces_ptr):
    piece = pieces_ptr + tl.program_id(0).to(tl.int64) * 3
    return tl.load(piece), tl.load(piece + 1), tl.load(piece + 2)


@jit
def _address(entry, start, kind: tl.constexpr, ALIGNED: tl.constexpr):
    """A pointer to element `start` of the tensor whose address is stored at `entry`."""
    first = tl.load(entry).to(kind)
    if ALIGNED:
        # a piece starts at a multiple of PIECE, so it is as aligned as the tensor
        return tl.multiple_of(first + start, 16)
    return first + start


@jit
def _update(
    param_ptr, grad_ptr, exp_avg_ptr, exp_avg_sq_ptr, copy_ptr, index, mask,
    factor, step_size, denominator, decay, weight1, beta2, weight2, eps,
):  # fmt: skip
    """The multiply-adds, divisions and roots of torch's fused AdamW on a CPU, each rounded once."""
    g = tl.load(grad_ptr + index, mask=mask).to(tl.float32) * factor
    m = tl.load(exp_avg_ptr + index, mask=mask)
    v = tl.load(exp_avg_sq_ptr + index, mask=mask)
    p = tl.load(param_ptr + index, mask=mask)
    m = tl.fma(g - m, weight1 + tl.zeros_like(m), m)
    v = tl.fma(g * weight2, g, v * beta2)
    p = p * decay - tl.div_rn(m * step_size, tl.div_rn(tl.sqrt_rn(v), denominator) + eps)
    tl.store(exp_avg_ptr + index, m, mask=mask)
    tl.store(exp_avg_sq_ptr + index, v, mask=mask)
    tl.store(param_ptr + index, p, mask=mask)
    if copy_ptr is not None:
        tl.store(copy_ptr + index, rounded(p, copy_ptr.dtype.element_ty), mask=mask)


@jit
def sum_squares_kernel(
    addresses_ptr, pieces_ptr, like, partial_ptr, ALIGNED: tl.constexpr, PIECE: tl.constexpr, BLOCK: tl.constexpr
):
    """One program sums the squares of one piece in fp32."""
    tensor, start, count = _piece(pieces_ptr)
    x_ptr = _address(addresses_ptr + tensor, start, like.dtype, ALIGNED)
    total = tl.zeros([BLOCK], tl.float32)
    whole = tl.where(count == PIECE, count, 0)
    for first in range(0, whole, BLOCK):
        index = first + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + index).to(tl.float32)
        total += x * x
    for first in range(whole, count, BLOCK):
        index = first + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + index, mask=index < count, other=0.0).to(tl.float32)
        total += x * x
    tl.store(partial_ptr + tl.program_id(0), tl.sum(total, 0))


@jit
def add_up_kernel(partial_ptr, out_ptr, num_partial, BLOCK: tl.constexpr):
    """One program adds all partial sums in fp64, in a fixed order."""
    total = tl.zeros([BLOCK], tl.float64)
    for first in range(0, num_partial, BLOCK):
        index = first + tl.arange(0, BLOCK)
        total += tl.load(partial_ptr + index, mask=index < num_partial, other=0.0).to(tl.float64)
    tl.store(out_ptr, tl.sum(total, 0))
