"""RMSNorm, alone and fused with the residual addition before it: each tensor is read and written once.

T rows, D model.

Two castings exist. Llama rounds the normalised row to the model's dtype and multiplies by the weight; Gemma
multiplies by (1 + weight) in fp32 and rounds last. In the backward pass each program walks over many rows and
accumulates a partial sum of the weight's gradient in fp32; a second kernel adds these in a fixed order, so results
are bit-identical between runs. The number of programs depends on the GPU model only.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Literal

import torch
from torch.autograd.function import once_differentiable

from dist_cpt_kernels import reference
from dist_cpt_kernels.dispatch import can_fuse, jit, tl
from dist_cpt_kernels.rounding import rounded

Casting = Literal["llama", "gemma"]

MAX_DIM = 16384  # one program holds a whole row; registers spill beyond this
MAX_SHARED_DIM = 8192  # the same, with a partial weight gradient beside the row
TILE = 1024  # elements per program for short rows, such as those of one head
PARTS, PART_COLUMNS = 16, 64  # per iteration of the second stage
SHARE_ROWS, SHARE_COLUMNS = 8, 512  # per iteration of the separate weight-gradient kernel


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6, *, casting: Casting = "llama") -> torch.Tensor:
    """x / sqrt(mean of x^2 + eps) times `weight` [D], or (1 + weight) for "gemma": [..., D] in the dtype of `x`.

    The gradient of `weight` is summed in fp32, deterministically, rounded once to its dtype, and skipped for a
    frozen weight.

    Raises:
        ValueError: shapes or dtypes do not match, or an unknown casting.
    """
    _check(x, None, weight, casting)
    if not _fits(x, weight):
        return reference.rms_norm(x, weight, eps, casting=casting)
    return _RmsNorm.apply(x, None, weight, eps, casting == "gemma")[0]


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6, *, casting: Casting = "llama"
) -> tuple[torch.Tensor, torch.Tensor]:
    """(`rms_norm` of x + residual, x + residual), both [..., D] in the dtype of `x` and `residual`.

    The sum is rounded to that dtype before it is normalised, as in the unfused composition. `x` and `residual`
    share one gradient tensor.

    Raises:
        ValueError: shapes or dtypes do not match, or an unknown casting.
    """
    _check(x, residual, weight, casting)
    if not _fits(x, weight):
        return reference.add_rms_norm(x, residual, weight, eps, casting=casting)
    return _RmsNorm.apply(x, residual, weight, eps, casting == "gemma")


def _check(x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, casting: str) -> None:
    if casting not in ("llama", "gemma"):
        raise ValueError(f"casting: expected llama or gemma, got {casting!r}")
    if not x.ndim or weight.shape != x.shape[-1:]:
        raise ValueError(f"x and weight: expected [..., D] and [D], got {[*x.shape]} and {[*weight.shape]}")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(f"residual: expected {x.dtype} {[*x.shape]} as x, got {residual.dtype} {[*residual.shape]}")


def _fits(x: torch.Tensor, weight: torch.Tensor) -> bool:
    return can_fuse(x, weight) and x.shape[-1] <= MAX_DIM


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float, gemma: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        ctx.set_materialize_grads(False)
        x, weight, dim = x.contiguous(), weight.contiguous(), x.shape[-1]
        num_rows = x.shape[:-1].numel()
        out = torch.empty_like(x)
        total = None if residual is None else torch.empty_like(x)
        rstd_T = torch.empty(num_rows, dtype=torch.float32, device=x.device)
        if x.numel():
            rows, block, warps = tile(dim)
            rms_norm_kernel[(-(-num_rows // rows),)](
                x, None if residual is None else residual.contiguous(), weight, out, total, rstd_T, num_rows, dim,
                eps,
                GEMMA=gemma, ROWS=rows, BLOCK=block, num_warps=warps,
            )  # fmt: skip
        ctx.save_for_backward(x if total is None else total, weight, rstd_T)
        ctx.gemma, ctx.added = gemma, residual is not None
        return out, total

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, None, None]:
        grad, grad_total = grad_outputs
        x, weight, rstd_T = ctx.saved_tensors
        want_x, want_weight = ctx.needs_input_grad[0] or ctx.needs_input_grad[1], ctx.needs_input_grad[2]
        if grad is None:  # the normalised rows were not used
            return grad_total, grad_total if ctx.added else None, None, None, None
        dx = torch.empty_like(x) if want_x else None
        dweight = torch.zeros_like(weight) if want_weight else None
        if x.numel():
            grad_total = None if grad_total is None else grad_total.contiguous()
            _launch_backward(grad.contiguous(), grad_total, x, weight, rstd_T, dx, dweight, ctx.gemma)
        return dx, dx if ctx.added else None, dweight, None, None


def tile(dim: int) -> tuple[int, int, int]:
    """(rows, columns, warps) of one program."""
    block = max(16, 1 << (dim - 1).bit_length())
    rows = max(1, TILE // block)
    return rows, block, min(max(rows * block // 512, 1), 32)


def _launch_backward(
    grad: torch.Tensor,
    grad_total: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor,
    rstd_T: torch.Tensor,
    dx: torch.Tensor | None,
    dweight: torch.Tensor | None,
    gemma: bool,
) -> None:
    num_rows, dim = len(rstd_T), x.shape[-1]
    rows, block, warps = tile(dim)
    num_tiles = -(-num_rows // rows)
    num_programs, parts, together = num_tiles, None, block <= MAX_SHARED_DIM
    if dweight is not None and together:
        num_programs = min(num_tiles, _num_programs(x.device))
        parts = torch.empty((num_programs, dim), dtype=torch.float32, device=x.device)
    if dx is not None or parts is not None:
        rms_norm_backward_kernel[(num_programs,)](
            grad, grad_total, x, weight, rstd_T, dx, parts, num_rows, dim,
            GEMMA=gemma, ROWS=rows, BLOCK=block, num_warps=warps,
        )  # fmt: skip
    if dweight is not None and not together:
        parts = _weight_shares(grad, x, rstd_T)
    if parts is not None:
        add_parts_kernel[(-(-dim // PART_COLUMNS),)](
            parts, dweight, len(parts), dim, PARTS=PARTS, BLOCK=PART_COLUMNS, num_warps=4
        )


def _weight_shares(grad: torch.Tensor, x: torch.Tensor, rstd_T: torch.Tensor) -> torch.Tensor:
    """Partial sums of the weight's gradient, fp32 [shares, D], from another read of x and its gradient."""
    num_rows, dim = len(rstd_T), x.shape[-1]
    num_columns = -(-dim // SHARE_COLUMNS)
    num_shares = min(-(-num_rows // SHARE_ROWS), max(1, _num_programs(x.device) // num_columns))
    parts = torch.empty((num_shares, dim), dtype=torch.float32, device=x.device)
    weight_shares_kernel[(num_shares, num_columns)](
        grad, x, rstd_T, parts, num_rows, dim, ROWS=SHARE_ROWS, BLOCK=SHARE_COLUMNS, num_warps=4
    )
    return parts


@cache
def _num_programs(device: torch.device) -> int:
    """Two per multiprocessor, so that one computes while the other waits for memory."""
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 5


@jit
def rms_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, out_ptr, total_ptr, rstd_ptr, num_rows, dim, eps,
    GEMMA: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program normalises ROWS rows; with a residual, their sum, which is stored to `total`."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < num_rows)[:, None] & (column < dim)
    place = row[:, None] * dim + column
    x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        x += tl.load(residual_ptr + place, mask=inside, other=0.0).to(tl.float32)
        total = rounded(x, total_ptr.dtype.element_ty)
        tl.store(total_ptr + place, total, mask=inside)
        x = total.to(tl.float32)
    rstd = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(x * x, 1) / dim + eps))
    tl.store(rstd_ptr + row, rstd, mask=row < num_rows)
    normed = x * rstd[:, None]
    weight = tl.load(weight_ptr + column, mask=column < dim, other=0.0).to(tl.float32)
    if GEMMA:
        out = normed * (1.0 + weight)
    else:
        out = rounded(normed, out_ptr.dtype.element_ty).to(tl.float32) * weight
    tl.store(out_ptr + place, rounded(out, out_ptr.dtype.element_ty), mask=inside)


@jit
def rms_norm_backward_kernel(
    grad_ptr, grad_total_ptr, x_ptr, weight_ptr, rstd_ptr, dx_ptr, parts_ptr, num_rows, dim,
    GEMMA: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program p computes dx of tiles p, p + programs, ..., and stores its partial weight gradient to parts[p].

    dx = rstd (w dy - n mean(w dy n)) + the gradient of the sum, n the normalised row. A None pointer skips its part.
    """
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK)[None, :]
    dweight = tl.zeros([ROWS, BLOCK], tl.float32)
    for step in range(program, tl.cdiv(num_rows, ROWS), tl.num_programs(0)):
        row = tl.cast(step, tl.int64) * ROWS + tl.arange(0, ROWS)
        inside = (row < num_rows)[:, None] & (column < dim)
        place = row[:, None] * dim + column
        x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + place, mask=inside, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row, mask=row < num_rows, other=0.0)[:, None]
        normed = x * rstd
        if parts_ptr is not None:
            dweight += grad * normed
        if dx_ptr is not None:
            weight = tl.load(weight_ptr + column, mask=column < dim, other=0.0).to(tl.float32)
            if GEMMA:
                weight += 1.0
            grad *= weight
            dx = (grad - normed * (tl.sum(grad * normed, 1) / dim)[:, None]) * rstd
            if grad_total_ptr is not None:
                other = tl.load(grad_total_ptr + place, mask=inside, other=0.0)
                dx += other.to(tl.float32)
            tl.store(dx_ptr + place, rounded(dx, dx_ptr.dtype.element_ty), mask=inside)
    if parts_ptr is not None:
        share = tl.expand_dims(tl.sum(dweight, 0), 0)
        tl.store(parts_ptr + tl.cast(program, tl.int64) * dim + column, share, mask=column < dim)


@jit
def weight_shares_kernel(
    grad_ptr, x_ptr, rstd_ptr, parts_ptr, num_rows, dim,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The partial weight gradient of the kernel above alone, for BLOCK columns."""
    share = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    dweight = tl.zeros([ROWS, BLOCK], tl.float32)
    for step in range(share, tl.cdiv(num_rows, ROWS), tl.num_programs(0)):
        row = tl.cast(step, tl.int64) * ROWS + tl.arange(0, ROWS)
        inside = (row < num_rows)[:, None] & (column < dim)
        place = row[:, None] * dim + column
        x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + place, mask=inside, other=0.0).to(tl.float32)
        dweight += grad * x * tl.load(rstd_ptr + row, mask=row < num_rows, other=0.0)[:, None]
    total = tl.expand_dims(tl.sum(dweight, 0), 0)
    tl.store(parts_ptr + tl.cast(share, tl.int64) * dim + column, total, mask=column < dim)


@jit
def add_parts_kernel(parts_ptr, out_ptr, num_parts, dim, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """One program sums BLOCK columns over all rows of `parts`, in a fixed order."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([PARTS, BLOCK], tl.float32)
    for first in range(0, num_parts, PARTS):
        part = first + tl.arange(0, PARTS)
        inside = (part < num_parts)[:, None] & (column < dim)[None, :]
        total += tl.load(parts_ptr + part[:, None].to(tl.int64) * dim + column[None, :], mask=inside, other=0.0)
    out = rounded(tl.sum(total, 0), out_ptr.dtype.element_ty)
    tl.store(out_ptr + column, out, mask=column < dim)
