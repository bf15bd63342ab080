"""Rotary position embedding of queries and keys in one kernel; the backward pass rotates back.

B batch, L sequence, H query heads, K key heads, N head dim, R rotating pairs of it, P positions.

Angles come from fp32 tables indexed by position, so packed documents, whose positions restart, cost nothing, and no
rounded cosine is multiplied. Results are new contiguous buffers: the caller's queries and keys are not modified.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from dist_cpt_kernels import reference
from dist_cpt_kernels.dispatch import can_fuse, jit, tl
from dist_cpt_kernels.rounding import rounded

MAX_HEADS = 32  # per iteration of a program


def rope_tables(
    inv_freq: torch.Tensor, num_positions: int, *, scaling: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """(cos, sin) fp32 [P, R] of position * inv_freq, times `scaling`, for `inv_freq` fp32 [R]."""
    angles = torch.arange(num_positions, dtype=torch.float32, device=inv_freq.device)[:, None] * inv_freq.float()
    return angles.cos() * scaling, angles.sin() * scaling


def rope(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, position_ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate `q` [B, L, H, N] and `k` [B, L, K, N] by the angles of `position_ids` int64 [B, L].

    The first 2 R of N rotate, i with i + R; the rest is copied. `q` and `k` may be slices of one projection, which
    are read in place; other strides are copied first. `cos` and `sin` fp32 [P, R] are not differentiated. A
    position outside [0, P) gives NaN on a GPU.

    Raises:
        ValueError: shapes or dtypes do not match, or (on the CPU) a position is outside the tables.
    """
    _check(q, k, cos, sin, position_ids)
    if not can_fuse(q, k, cos):
        return reference.rope(q, k, cos, sin, position_ids)
    return _Rope.apply(q, k, cos.detach(), sin.detach(), position_ids)


def _check(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, position_ids: torch.Tensor) -> None:
    if q.ndim != 4 or k.ndim != 4 or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q and k: expected [B, L, H, N] and [B, L, K, N], got {[*q.shape]} and {[*k.shape]}")
    if cos.ndim != 2 or cos.shape != sin.shape or 2 * cos.shape[1] > q.shape[-1]:
        raise ValueError(
            f"cos and sin: expected [P, R] with 2 R <= {q.shape[-1]}, got {[*cos.shape]} and {[*sin.shape]}"
        )
    if cos.dtype not in (torch.float32, torch.float64) or sin.dtype != cos.dtype:
        raise ValueError(f"cos and sin: expected fp32, got {cos.dtype} and {sin.dtype}")
    if position_ids.dtype != torch.int64 or position_ids.shape != q.shape[:2]:
        raise ValueError(
            f"position_ids: expected int64 {[*q.shape[:2]]}, got {position_ids.dtype} {[*position_ids.shape]}"
        )
    if position_ids.device.type == "cpu" and position_ids.numel():
        lowest, highest = (int(end) for end in position_ids.aminmax())
        if lowest < 0 or highest >= len(cos):
            raise ValueError(f"position_ids: expected 0 to {len(cos) - 1}, got {lowest} to {highest}")


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, position_ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin, position_ids = cos.contiguous(), sin.contiguous(), position_ids.contiguous()
        ctx.save_for_backward(cos, sin, position_ids)
        return _launch(q, k, cos, sin, position_ids, inverse=False)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        # The results are contiguous whatever the layout of attention's gradients: the projections then copy nothing.
        return *_launch(*grad_outputs, *ctx.saved_tensors, inverse=True), None, None, None


def _launch(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, position_ids: torch.Tensor, *, inverse: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    q_out, k_out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    num_q_heads, head_dim = q.shape[2:]
    num_k_heads, half = k.shape[2], cos.shape[1]
    if q.numel() or k.numel():
        q_rows, k_rows = _rows_of(q), _rows_of(k)
        rope_kernel[(position_ids.numel(),)](
            q_rows, q_rows.stride(0), q_out, k_rows, k_rows.stride(0), k_out, cos, sin, position_ids, cos.shape[0],
            num_q_heads, num_k_heads, half, head_dim,
            INVERSE=inverse, **_blocks(num_q_heads, num_k_heads, half, head_dim),
        )  # fmt: skip
    return q_out, k_out


def _rows_of(x: torch.Tensor) -> torch.Tensor:
    """[B, L, H, N] as [T, H, N] with contiguous rows: a view of a whole projection or of a slice of one."""
    rows = x.flatten(0, 1)
    return rows if rows[0].is_contiguous() else rows.contiguous()


def _blocks(num_q_heads: int, num_k_heads: int, half: int, head_dim: int) -> dict[str, int]:
    """The block sizes of a launch: heads per iteration, columns of a half and of the rest, warps."""
    q_heads, k_heads = (min(MAX_HEADS, _power_of_two(num)) for num in (num_q_heads, num_k_heads))
    rest = head_dim - 2 * half
    pairs = max(q_heads, k_heads) * _power_of_two(half)
    return {
        "Q_HEADS": q_heads,
        "K_HEADS": k_heads,
        "HALF": _power_of_two(half),
        "REST": _power_of_two(rest) if rest else 0,
        "num_warps": min(max(pairs // 512, 1), 8),
    }


def _power_of_two(number: int) -> int:
    """The smallest power of two that is at least `number`."""
    return 1 << max(number - 1, 0).bit_length()


@jit
def rope_kernel(
    q_ptr, q_stride, q_out_ptr, k_ptr, k_stride, k_out_ptr, cos_ptr, sin_ptr, positions_ptr, num_positions,
    num_q_heads, num_k_heads, half, head_dim,
    INVERSE: tl.constexpr, Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """One program rotates all heads of one token."""
    token = tl.program_id(0).to(tl.int64)
    position = tl.load(positions_ptr + token)
    column = tl.arange(0, HALF)
    known = column < tl.where((position >= 0) & (position < num_positions), half, 0)
    cos = tl.load(cos_ptr + position * half + column, mask=known, other=float("nan"))
    sin = tl.load(sin_ptr + position * half + column, mask=known, other=float("nan"))
    if INVERSE:
        sin = -sin
    q_out_ptr += token * num_q_heads * head_dim
    k_out_ptr += token * num_k_heads * head_dim
    _rotate(q_ptr + token * q_stride, q_out_ptr, cos, sin, num_q_heads, half, head_dim, Q_HEADS, HALF, REST)
    _rotate(k_ptr + token * k_stride, k_out_ptr, cos, sin, num_k_heads, half, head_dim, K_HEADS, HALF, REST)


@jit
def _rotate(
    x_ptr, out_ptr, cos, sin, num_heads, half, head_dim,
    HEADS: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    for first_head in range(0, num_heads, HEADS):
        head = (first_head + tl.arange(0, HEADS)).to(tl.int64)[:, None]
        column = tl.arange(0, HALF)[None, :]
        inside = (head < num_heads) & (column < half)
        x_at, out_at = x_ptr + head * head_dim, out_ptr + head * head_dim
        first = tl.load(x_at + column, mask=inside, other=0.0).to(tl.float32)
        second = tl.load(x_at + column + half, mask=inside, other=0.0).to(tl.float32)
        turned = first * cos[None, :] - second * sin[None, :]
        tl.store(out_at + column, rounded(turned, out_ptr.dtype.element_ty), mask=inside)
        turned = second * cos[None, :] + first * sin[None, :]
        tl.store(out_at + column + half, rounded(turned, out_ptr.dtype.element_ty), mask=inside)
        if REST > 0:
            column = 2 * half + tl.arange(0, REST)[None, :]
            inside = (head < num_heads) & (column < head_dim)
            tl.store(out_at + column, tl.load(x_at + column, mask=inside, other=0.0), mask=inside)
