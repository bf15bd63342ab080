"""Gated activations, SwiGLU and GeGLU: act(gate) * up in one pass, both gradients in another.

T tokens, F ffn.

Only gate and up are kept; the backward pass computes the activation again. tanh and the logistic function are
one: 0.5 (1 + tanh(u)) = sigmoid(2 u), and sigmoid is formed from exp(-|x|), which cannot overflow and keeps the
digits of its small values.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch.autograd.function import once_differentiable

from dist_cpt_kernels import reference
from dist_cpt_kernels.dispatch import available, jit, tl
from dist_cpt_kernels.rounding import rounded

Activation = Literal["silu", "gelu_tanh", "gelu_exact"]

ACTIVATIONS = ("silu", "gelu_tanh", "gelu_exact")
BLOCK = 1024  # elements of one program: 16 bytes of bf16 for each thread and tensor
NUM_WARPS = 4


def gated(gate: torch.Tensor, up: torch.Tensor, activation: Activation = "silu") -> torch.Tensor:
    """activation(gate) * up, [..., F] in their dtype; computed in fp32 and rounded once.

    `gate` and `up` [..., F] of any strides, two halves of one projection too; made contiguous where their rows do
    not lie at one distance. Neither is overwritten, in the backward pass neither.

    Raises:
        ValueError: shapes, dtypes or an activation that do not fit.
    """
    _check(gate, up, activation)
    if not _can_fuse(gate):
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

    For a caller that writes its own backward pass: one launch, each input read once. With `overwrite` the three
    results lie over `gate`, `up` and `grad`, in this order: only for a caller that owns all of them and reads them
    no more; they must be contiguous then. Not differentiable.

    Raises:
        ValueError: shapes, dtypes, strides or an activation that do not fit.
    """
    _check(gate, up, activation)
    if grad.shape != gate.shape:
        raise ValueError(f"grad: {[*gate.shape]} as gate expected, got {[*grad.shape]}")
    if overwrite and not all(t.is_contiguous() and t.dtype == gate.dtype for t in (grad, gate, up)):
        raise ValueError("overwrite: grad, gate and up must be contiguous and of one dtype")
    grad, gate, up = grad.detach(), gate.detach(), up.detach()
    if _can_fuse(gate):
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
        raise ValueError(f"activation: {', '.join(ACTIVATIONS)} expected, got {activation!r}")
    if gate.shape != up.shape or gate.dtype != up.dtype or not gate.ndim:
        raise ValueError(
            f"gate and up of one shape [..., F] and dtype expected, got {gate.dtype} {[*gate.shape]} "
            f"and {up.dtype} {[*up.shape]}"
        )


def _can_fuse(gate: torch.Tensor) -> bool:
    """The kernel computes in fp32, so fp64 is left to the reference."""
    return available(gate) and gate.dtype in (torch.bfloat16, torch.float16, torch.float32)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor, activation: Activation) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
        if out.numel():
            rows, grid, width = _rows_of(gate, up, out)
            gated_kernel[grid](
                *(argument for row in rows for argument in (row, row.stride(0))),
                width,
                ACTIVATION=activation,
                BLOCK=BLOCK,
                num_warps=NUM_WARPS,
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
        given = [grad, gate, up, dgate, dup] if value is None else [grad, gate, up, dgate, dup, value]
        rows, grid, width = _rows_of(*given)
        arguments = [argument for row in rows for argument in (row, row.stride(0))]
        gated_gradients_kernel[grid](
            *(arguments if value is not None else [*arguments, None, 0]),
            width,
            ACTIVATION=activation,
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
        )
    return dgate, dup, value


def _rows_of(*tensors: torch.Tensor) -> tuple[list[torch.Tensor], tuple[int], int]:
    """(each as [rows, width] with a last stride of 1, grid, width): one long row where all are contiguous."""
    if all(tensor.is_contiguous() for tensor in tensors):
        rows = [tensor.view(1, -1) for tensor in tensors]
    else:
        rows = [tensor.reshape(-1, tensor.shape[-1]) for tensor in tensors]
        rows = [row if row.stride(1) == 1 else row.contiguous() for row in rows]
    num_rows, width = rows[0].shape
    return rows, (num_rows * -(-width // BLOCK),), width


@jit
def gated_kernel(
    gate_ptr, gate_stride, up_ptr, up_stride, out_ptr, out_stride, width, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr
):
    """One program, BLOCK elements of one row."""
    row, column = _place(width, BLOCK)
    inside = column < width
    gate = tl.load(gate_ptr + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    value, _ = _activate(gate, ACTIVATION)
    tl.store(out_ptr + row * out_stride + column, rounded(value * up, out_ptr.dtype.element_ty), mask=inside)


@jit
def gated_gradients_kernel(
    grad_ptr,
    grad_stride,
    gate_ptr,
    gate_stride,
    up_ptr,
    up_stride,
    dgate_ptr,
    dgate_stride,
    dup_ptr,
    dup_stride,
    value_ptr,
    value_stride,
    width,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """As above; each result may lie over an input, for a thread writes only where it has read."""
    row, column = _place(width, BLOCK)
    inside = column < width
    grad = tl.load(grad_ptr + row * grad_stride + column, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    value, slope = _activate(gate, ACTIVATION)
    dgate = rounded(grad * up * slope, dgate_ptr.dtype.element_ty)
    tl.store(dgate_ptr + row * dgate_stride + column, dgate, mask=inside)
    tl.store(dup_ptr + row * dup_stride + column, rounded(grad * value, dup_ptr.dtype.element_ty), mask=inside)
    if value_ptr is not None:
        out = rounded(value * up, value_ptr.dtype.element_ty)
        tl.store(value_ptr + row * value_stride + column, out, mask=inside)


@jit
def _place(width, BLOCK: tl.constexpr):
    """(row, columns) of this program, in 64 bits."""
    blocks = tl.cdiv(width, BLOCK)
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64)
    return row, (program % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)


@jit
def _activate(x, ACTIVATION: tl.constexpr):
    """(activation, its slope) of fp32 `x`."""
    # at 200 every exponential below is 0 already, and nothing overflows
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
