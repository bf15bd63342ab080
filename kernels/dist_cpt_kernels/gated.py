"""Gated activations, SwiGLU and GeGLU: act(gate) * up in one kernel, both gradients in another.

T tokens, F ffn.

Only gate and up are saved; the backward pass recomputes the activation. tanh is expressed through the logistic
function, 0.5 (1 + tanh(u)) = sigmoid(2 u), and the sigmoid is computed from exp(-|x|), which cannot overflow and
keeps the precision of small values.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch.autograd.function import once_differentiable

from dist_cpt_kernels import reference
from dist_cpt_kernels.dispatch import can_fuse, jit, tl
from dist_cpt_kernels.rounding import rounded

Activation = Literal["silu", "gelu_tanh", "gelu_exact"]

ACTIVATIONS = ("silu", "gelu_tanh", "gelu_exact")
BLOCK = 1024  # elements per program: 16 bytes of bf16 per thread and tensor
NUM_WARPS = 4


def gated(gate: torch.Tensor, up: torch.Tensor, activation: Activation = "silu") -> torch.Tensor:
    """activation(gate) * up, [..., F] in their dtype; computed in fp32 and rounded once.

    The halves of one projection are read in place; `gate` and `up` of other strides are copied. Neither input is
    overwritten, in the backward pass neither.

    Raises:
        ValueError: shapes or dtypes do not match, or an unknown activation.
    """
    _check(gate, up, activation)
    if not can_fuse(gate):
        return reference.gated(gate, up, activation)
    return _Gated.apply(gate, up, activation)


def gated_gradients(
    grad: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    activation: Activation = "silu",
    *,
    want_value: bool = False,
    overwrite: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(gradient of `gate`, gradient of `up`, with `want_value` activation(gate) * up), each [..., F].

    For a caller with a hand-written backward pass: one launch that reads each input once. With `overwrite` the
    results are stored in `gate`, `up` and `grad`, in this order, which must be contiguous. Not differentiable.

    Raises:
        ValueError: shapes, dtypes or strides do not match, or an unknown activation.
    """
    _check(gate, up, activation)
    if grad.shape != gate.shape:
        raise ValueError(f"grad: expected the shape of gate {[*gate.shape]}, got {[*grad.shape]}")
    if overwrite and not all(t.is_contiguous() and t.dtype == gate.dtype for t in (grad, gate, up)):
        raise ValueError("overwrite: grad, gate and up must be contiguous and have the same dtype")
    grad, gate, up = grad.detach(), gate.detach(), up.detach()
    if can_fuse(gate):
        return _gradients(grad, gate, up, activation, want_value, overwrite)
    with torch.enable_grad():
        inputs = gate.clone().requires_grad_(), up.clone().requires_grad_()
        value = reference.gated(*inputs, activation)
    dgate, dup = torch.autograd.grad(value, inputs, grad)
    result = value.detach() if want_value else None
    if not overwrite:
        return dgate, dup, result
    return gate.copy_(dgate), up.copy_(dup), None if result is None else grad.copy_(result)


def _check(gate: torch.Tensor, up: torch.Tensor, activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected {', '.join(ACTIVATIONS)}, got {activation!r}")
    if gate.shape != up.shape or gate.dtype != up.dtype or not gate.ndim:
        raise ValueError(
            f"gate and up: expected the same shape [..., F] and dtype, got {gate.dtype} {[*gate.shape]} "
            f"and {up.dtype} {[*up.shape]}"
        )


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor, activation: Activation) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
        if out.numel():
            gate, up, width, grid = _rows_of(gate, up)
            gated_kernel[grid](
                gate, up, gate.stride(0), out, width, ACTIVATION=activation, BLOCK=BLOCK, num_warps=NUM_WARPS
            )
        return out

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, None]:
        gate, up = ctx.saved_tensors
        dgate, dup, _ = _gradients(grad_outputs[0], gate, up, ctx.activation, False, False)
        return dgate, dup, None


def _gradients(
    grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, activation: str, want_value: bool, overwrite: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    if overwrite:
        dgate, dup, value = gate, up, grad if want_value else None
    else:
        dgate, dup = (torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) for _ in range(2))
        value = torch.empty_like(dgate) if want_value else None
    if gate.numel():
        gate, up, width, grid = _rows_of(gate, up)
        gated_gradients_kernel[grid](
            grad.contiguous(), gate, up, gate.stride(0), dgate, dup, value, width,
            ACTIVATION=activation, BLOCK=BLOCK, num_warps=NUM_WARPS,
        )  # fmt: skip
    return dgate, dup, value


def _rows_of(gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int, tuple[int]]:
    """(gate, up, width, grid): both as [rows, width] with one row stride, a single long row if contiguous."""
    if gate.is_contiguous() and up.is_contiguous():
        rows = gate.view(1, -1), up.view(1, -1)
    else:
        rows = gate.reshape(-1, gate.shape[-1]), up.reshape(-1, up.shape[-1])
        if rows[0].stride() != rows[1].stride() or rows[0].stride(1) != 1:
            rows = rows[0].contiguous(), rows[1].contiguous()
    num_rows, width = rows[0].shape
    return *rows, width, (num_rows * -(-width // BLOCK),)


@jit
def gated_kernel(gate_ptr, up_ptr, stride, out_ptr, width, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    """One program computes BLOCK elements of one row."""
    row, column = _place(width, BLOCK)
    inside = column < width
    gate = tl.load(gate_ptr + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    value, _ = _activate(gate, ACTIVATION)
    tl.store(out_ptr + row * width + column, rounded(value * up, out_ptr.dtype.element_ty), mask=inside)


@jit
def gated_gradients_kernel(
    grad_ptr, gate_ptr, up_ptr, stride, dgate_ptr, dup_ptr, value_ptr, width,
    ACTIVATION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """As above; results may alias inputs, since a thread writes only where it has read."""
    row, column = _place(width, BLOCK)
    inside = column < width
    place = row * width + column
    grad = tl.load(grad_ptr + place, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    value, slope = _activate(gate, ACTIVATION)
    tl.store(dgate_ptr + place, rounded(grad * up * slope, dgate_ptr.dtype.element_ty), mask=inside)
    tl.store(dup_ptr + place, rounded(grad * value, dup_ptr.dtype.element_ty), mask=inside)
    if value_ptr is not None:
        tl.store(value_ptr + place, rounded(value * up, value_ptr.dtype.element_ty), mask=inside)


@jit
def _place(width, BLOCK: tl.constexpr):
    """(row, columns) of this program, in 64 bits."""
    blocks = tl.cdiv(width, BLOCK)
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64)
    return row, (program % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)


@jit
def _activate(x, ACTIVATION: tl.constexpr):
    """(activation, its derivative) of fp32 `x`."""
    # at 200 every exponential below is already 0, and nothing overflows
    size = tl.minimum(tl.abs(x), 200.0, propagate_nan=tl.PropagateNan.ALL)
    bounded = tl.where(x < 0.0, -size, size)
    if ACTIVATION == "gelu_exact":
        share = 0.5 + 0.5 * tl.math.erf(x * 0.7071067811865476)  # Phi(x)
        density = tl.exp(-0.5 * size * size) * 0.3989422804014327
        return x * share, share + bounded * density
    inner = 1.0
    if ACTIVATION == "gelu_tanh":
        square = size * size
        size *= 1.5957691216057308 * (1.0 + 0.044715 * square)  # 2 sqrt(2 / pi)
        inner = 1.5957691216057308 * (1.0 + 0.134145 * square)
    e = tl.exp(-size)
    below = tl.div_rn(e, 1.0 + e)  # sigmoid(-size)
    above = tl.div_rn(1.0, 1.0 + e)
    share = tl.where(x < 0.0, below, above)
    return x * share, share + bounded * inner * below * above
