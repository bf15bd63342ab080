"""Rotary position embedding of queries and keys in one kernel, by position ids; backward is the rotation back.

B batch, L sequence, H query heads, K key heads, N head dim, R rotating pairs of it, P positions.

Angles come as fp32 tables of the positions, so that packed documents, whose positions start anew, cost nothing and
no rounded cosine is multiplied. Results are new buffers in the order of their inputs' strides: the caller's queries
and keys stay as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from dist_cpt_kernels import reference
from dist_cpt_kernels.dispatch import available, jit, tl
from dist_cpt_kernels.rounding import rounded

MAX_HEADS = 32  # of one program at once


def rope_tables(
    inv_freq: torch.Tensor, num_positions: int, *, scaling: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """(cos, sin) fp32 [P, R] of position * inv_freq, times `scaling`, for `inv_freq` fp32 [R]."""
    angles = torch.arange(num_positions, dtype=torch.float32, device=inv_freq.device)[:, None] * inv_freq.float()
    return angles.cos() * scaling, angles.sin() * scaling


def rope(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    position_ids: torch.Tensor | None = None,
    *,
    heads_first: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`q` [B, L, H, N] and `k` [B, L, K, N], or [L, ., N] without B, rotated by the angles of their positions.

    With `heads_first` they are [B, H, L, N] and [B, K, L, N]. Any strides, none is copied. `cos` and `sin` fp32
    [P, R] are not differentiated; the first 2 R of N rotate, i with i + R, and the rest stays. `position_ids`
    int64 or int32 [B, L], [1, L] or [L] in [0, P), default 0 to L - 1; on a GPU one outside gives NaN.

    Raises:
        ValueError: shapes or dtypes that do not fit, or (on the CPU) a position outside the tables.
    """
    _check(q, k, cos, sin, position_ids, heads_first)
    if not _can_fuse(q, k, cos):
        return reference.rope(q, k, cos, sin, position_ids, heads_first=heads_first)
    return _Rope.apply(q, k, cos.detach(), sin.detach(), position_ids, heads_first)


def _check(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    position_ids: torch.Tensor | None,
    heads_first: bool,
) -> None:
    heads_dim = -3 if heads_first else -2
    shapes = [[*x.shape[:heads_dim], *x.shape[heads_dim + 1 :]] for x in (q, k)]
    if q.ndim not in (3, 4) or shapes[0] != shapes[1]:
        raise ValueError(f"q and k alike but for their heads expected, got {[*q.shape]} and {[*k.shape]}")
    if cos.ndim != 2 or cos.shape != sin.shape or 2 * cos.shape[1] > q.shape[-1]:
        raise ValueError(
            f"cos and sin [P, R] with 2 R <= {q.shape[-1]} expected, got {[*cos.shape]} and {[*sin.shape]}"
        )
    wide = (torch.float32, torch.float64)
    if cos.dtype not in wide or sin.dtype != cos.dtype:
        raise ValueError(f"cos and sin in fp32 expected, got {cos.dtype} and {sin.dtype}")
    batch, length = (1, *shapes[0][:-1])[-2:]
    if position_ids is None:
        if length > len(cos):
            raise ValueError(f"the tables hold {len(cos)} positions, the sequence {length}")
        return
    if position_ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"position_ids in int64 or int32 expected, got {position_ids.dtype}")
    if [*position_ids.shape] not in ([length], [1, length], [batch, length]):
        raise ValueError(f"position_ids [{batch}, {length}] or [{length}] expected, got {[*position_ids.shape]}")
    if position_ids.device.type == "cpu" and position_ids.numel():
        lowest, highest = (int(end) for end in position_ids.aminmax())
        if lowest < 0 or highest >= len(cos):
            raise ValueError(f"positions {lowest} to {highest} do not lie in the tables' {len(cos)}")


def _can_fuse(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor) -> bool:
    """The kernel computes in fp32, so fp64 is left to the reference."""
    narrow = (torch.bfloat16, torch.float16, torch.float32)
    return available(q) and q.dtype in narrow and k.dtype in narrow and cos.dtype == torch.float32


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        position_ids: torch.Tensor | None,
        heads_first: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(cos, sin, position_ids)
        ctx.heads_first = heads_first
        outs = torch.empty_like(q), torch.empty_like(k)
        ctx.layouts = [(out.shape, out.stride()) for out in outs]
        _launch((q, k), outs, cos, sin, position_ids, heads_first, inverse=False)
        return outs

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        cos, sin, position_ids = ctx.saved_tensors
        # in the layout of q and k, whatever attention's backward gives: the projection's backward then copies nothing
        outs = [
            None if grad is None else torch.empty_strided(*layout, dtype=grad.dtype, device=grad.device)
            for grad, layout in zip(grad_outputs, ctx.layouts, strict=True)
        ]
        _launch(grad_outputs, outs, cos, sin, position_ids, ctx.heads_first, inverse=True)
        return *outs, None, None, None, None


def _launch(
    inputs: Sequence[torch.Tensor | None],
    outs: Sequence[torch.Tensor | None],
    cos: torch.Tensor,
    sin: torch.Tensor,
    position_ids: torch.Tensor | None,
    heads_first: bool,
    inverse: bool,
) -> None:
    """Write each of `inputs`, rotated, to its one of `outs`; None is left out."""
    pointers_and_strides: list[Any] = []
    heads = [0, 0]
    batch = length = head_dim = 0
    for i, pair in enumerate(zip(inputs, outs, strict=True)):
        for tensor in pair:
            if tensor is None or not tensor.numel():
                pointers_and_strides += [None, 0, 0, 0, 0]
                continue
            x_BLHN = tensor if tensor.ndim == 4 else tensor.unsqueeze(0)
            x_BLHN = x_BLHN.transpose(1, 2) if heads_first else x_BLHN
            pointers_and_strides += [tensor, *x_BLHN.stride()]
            batch, length, heads[i], head_dim = x_BLHN.shape
    if not batch:
        return
    cos, sin = (table if table.stride(1) == 1 else table.contiguous() for table in (cos, sin))
    positions = None if position_ids is None else position_ids.expand(batch, length)
    rope_kernel[(batch * length,)](
        *pointers_and_strides,
        cos,
        cos.stride(0),
        sin,
        sin.stride(0),
        positions,
        *((0, 0) if positions is None else positions.stride()),
        cos.shape[0],
        length,
        *heads,
        cos.shape[1],
        head_dim,
        INVERSE=inverse,
        **blocks(heads[0], heads[1], cos.shape[1], head_dim),
    )


def blocks(num_q_heads: int, num_k_heads: int, half: int, head_dim: int) -> dict[str, int]:
    """The constants of a launch: heads at once, columns of a half and of the rest, warps."""
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
    """The smallest one that is not below `number`."""
    return 1 << max(number - 1, 0).bit_length()


@jit
def rope_kernel(
    q_ptr,
    q_stride_b,
    q_stride_l,
    q_stride_h,
    q_stride_n,
    q_out_ptr,
    q_out_stride_b,
    q_out_stride_l,
    q_out_stride_h,
    q_out_stride_n,
    k_ptr,
    k_stride_b,
    k_stride_l,
    k_stride_h,
    k_stride_n,
    k_out_ptr,
    k_out_stride_b,
    k_out_stride_l,
    k_out_stride_h,
    k_out_stride_n,
    cos_ptr,
    cos_stride,
    sin_ptr,
    sin_stride,
    positions_ptr,
    positions_stride_b,
    positions_stride_l,
    num_positions,
    length,
    num_q_heads,
    num_k_heads,
    half,
    head_dim,
    INVERSE: tl.constexpr,
    Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
):
    """One program, one token with all its heads. Pointers that are None switch their part off."""
    batch = (tl.program_id(0) // length).to(tl.int64)
    token = (tl.program_id(0) % length).to(tl.int64)
    position = token
    if positions_ptr is not None:
        position = tl.load(positions_ptr + batch * positions_stride_b + token * positions_stride_l).to(tl.int64)
    column = tl.arange(0, HALF)
    known = column < tl.where((position >= 0) & (position < num_positions), half, 0)
    cos = tl.load(cos_ptr + position * cos_stride + column, mask=known, other=float("nan"))
    sin = tl.load(sin_ptr + position * sin_stride + column, mask=known, other=float("nan"))
    if INVERSE:
        sin = -sin
    if q_ptr is not None:
        q_ptr += batch * q_stride_b + token * q_stride_l
        q_out_ptr += batch * q_out_stride_b + token * q_out_stride_l
        _rotate(q_ptr, q_stride_h, q_stride_n, q_out_ptr, q_out_stride_h, q_out_stride_n, cos, sin, num_q_heads,
                half, head_dim, Q_HEADS, HALF, REST)  # fmt: skip
    if k_ptr is not None:
        k_ptr += batch * k_stride_b + token * k_stride_l
        k_out_ptr += batch * k_out_stride_b + token * k_out_stride_l
        _rotate(k_ptr, k_stride_h, k_stride_n, k_out_ptr, k_out_stride_h, k_out_stride_n, cos, sin, num_k_heads,
                half, head_dim, K_HEADS, HALF, REST)  # fmt: skip


@jit
def _rotate(
    x_ptr,
    x_stride_h,
    x_stride_n,
    out_ptr,
    out_stride_h,
    out_stride_n,
    cos,
    sin,
    num_heads,
    half,
    head_dim,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
):
    for first_head in range(0, num_heads, HEADS):
        head = (first_head + tl.arange(0, HEADS)).to(tl.int64)[:, None]
        column = tl.arange(0, HALF)[None, :]
        inside = (head < num_heads) & (column < half)
        x_at, out_at = x_ptr + head * x_stride_h, out_ptr + head * out_stride_h
        first = tl.load(x_at + column * x_stride_n, mask=inside, other=0.0).to(tl.float32)
        second = tl.load(x_at + (column + half) * x_stride_n, mask=inside, other=0.0).to(tl.float32)
        turned = first * cos[None, :] - second * sin[None, :]
        tl.store(out_at + column * out_stride_n, rounded(turned, out_ptr.dtype.element_ty), mask=inside)
        turned = second * cos[None, :] + first * sin[None, :]
        tl.store(out_at + (column + half) * out_stride_n, rounded(turned, out_ptr.dtype.element_ty), mask=inside)
        if REST > 0:
            column = 2 * half + tl.arange(0, REST)[None, :]
            inside = (head < num_heads) & (column < head_dim)
            rest = tl.load(x_at + column * x_stride_n, mask=inside, other=0.0)
            tl.store(out_at + column * out_stride_n, rest, mask=inside)
