"""Cross-entropy of a linear head without the full logits; the gradient is computed in the forward pass.

T tokens, D model, V vocab, C tokens of one chunk.

For each chunk: z = h W^T (compute dtype), p = softmax(z) (fp32), dz = scale * (p - onehot(y)), then dh = dz W and
dW += dz^T h (fp32 across chunks). That is 6 T D V FLOPs, 4 with a frozen head, and the backward pass recomputes
nothing. Where kernels cannot run, `linear_cross_entropy_torch` has the softmax and the last product in torch.

The chunk size is a constant, so results do not depend on the memory that is free. A chunk reads and writes the fp32
dW once, so it must be long enough for its GEMM to hide that traffic.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from dist_cpt_kernels.cross_entropy import cross_entropy_in_place
from dist_cpt_kernels.dispatch import available, can_fuse, jit, tl
from dist_cpt_kernels.linear_cross_entropy_torch import SlicedProduct, Softmax
from dist_cpt_kernels.reference import IGNORE_INDEX
from dist_cpt_kernels.rounding import rounded

CHUNK_TOKENS = 2048  # above about 750 tokens dW's GEMM outweighs its 8 V D bytes of traffic on an H200
CHUNK_TOKENS_IN_TORCH = 1024
SCALE_BLOCK = 4096


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    chunk_tokens: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(scale * loss_sum, loss_sum): the summed cross-entropy of logits `hidden @ weight.T`, softcapped if asked.

    `hidden` [T, D] sets the compute dtype (autocast's where enabled), `weight` [V, D] may have another, `labels`
    int64 [T]. Both results are fp32 scalars (fp64 for fp64 inputs); only the first is differentiable. Rows with
    label -100 add nothing; if all are ignored, loss and gradients are 0. Gradients are computed only for inputs
    that require them. Nothing on a GPU causes a host sync. A label outside [0, V) on a GPU makes loss and gradients
    NaN.
    Source: softcap * tanh(logits / softcap), Gemma 2, section 2.

    Raises:
        ValueError: shapes do not match, a setting is not positive, or (on the CPU) a label is outside [0, V).
    """
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"expected hidden [T, D] and weight [V, D], got {[*hidden.shape]} and {[*weight.shape]}")
    if labels.shape != hidden.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(f"labels: expected int64 [{hidden.shape[0]}], got {labels.dtype} {[*labels.shape]}")
    for name, value in {"softcap": softcap, "chunk_tokens": chunk_tokens}.items():
        if value is not None and value <= 0:
            raise ValueError(f"{name}: expected a positive number or None, got {value}")
    _check_range(labels, weight.shape[0])
    if torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    options = _Options(scale, softcap, chunk_tokens, torch.is_grad_enabled())
    with torch.autocast(hidden.device.type, enabled=False):
        return _LinearCrossEntropy.apply(hidden, weight, labels, options)


def _check_range(labels: torch.Tensor, vocab: int) -> None:
    """Check labels on the CPU; on a GPU that would be a host sync."""
    if labels.device.type == "cpu" and labels.numel():
        outside = (labels != IGNORE_INDEX) & ((labels < 0) | (labels >= vocab))
        if bool(outside.any()):
            raise ValueError(f"labels: expected 0 to {vocab - 1} or {IGNORE_INDEX}, got {int(labels[outside][0])}")


@dataclass(frozen=True)
class _Options:
    scale: float
    softcap: float | None
    chunk_tokens: int | None
    grad_enabled: bool  # needs_input_grad is True for a leaf even under no_grad


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, options: _Options
    ) -> tuple[torch.Tensor, torch.Tensor]:
        need_hidden, need_weight = (need and options.grad_enabled for need in ctx.needs_input_grad[:2])
        wide = torch.promote_types(hidden.dtype, torch.float32)
        gradients = (
            torch.empty_like(hidden) if need_hidden else None,
            hidden.new_empty(weight.shape, dtype=wide) if need_weight else None,
        )
        loss = _accumulate(hidden, weight.to(hidden.dtype), labels, options, *gradients)
        ctx.weight_dtype = weight.dtype
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(loss)
        return loss * options.scale, loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        # With retain_graph a later backward reads them unscaled.
        if torch._C._autograd._get_current_graph_task_keep_graph():  # type: ignore[attr-defined]
            grad_hidden, grad_weight = (g if g is None else g.clone() for g in (grad_hidden, grad_weight))
        if grad_hidden is not None:
            grad_hidden = _scaled(grad_hidden, grad_outputs[0], grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = _scaled(grad_weight, grad_outputs[0], ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None


def _accumulate(
    hidden_TD: torch.Tensor,
    weight_VD: torch.Tensor,
    labels_T: torch.Tensor,
    options: _Options,
    grad_hidden_TD: torch.Tensor | None,
    grad_weight_VD: torch.Tensor | None,
) -> torch.Tensor:
    """The loss sum, fp32 [] (fp64 for fp64 inputs); fills the gradients, of which the weight's has that dtype too."""
    fused = can_fuse(hidden_TD)
    rows_T = None if fused else _kept_rows(labels_T)
    grad_TD = grad_hidden_TD
    if rows_T is not None:
        hidden_TD, labels_T = hidden_TD[rows_T], labels_T[rows_T]
        grad_TD = None if grad_TD is None else torch.empty_like(hidden_TD)
    num_tokens = hidden_TD.shape[0]
    chunk_tokens = options.chunk_tokens or (CHUNK_TOKENS if fused else CHUNK_TOKENS_IN_TORCH)
    labels_T = labels_T.contiguous()
    losses_T = hidden_TD.new_empty(num_tokens, dtype=torch.promote_types(hidden_TD.dtype, torch.float32))
    logits = hidden_TD.new_empty((min(chunk_tokens, num_tokens), weight_VD.shape[0]))
    want_grad = grad_hidden_TD is not None or grad_weight_VD is not None
    softmax = cross_entropy_in_place if fused else Softmax(logits, losses_T.dtype)
    add_product = _add_product if fused else SlicedProduct()
    for start in range(0, num_tokens, chunk_tokens):
        chunk = slice(start, min(start + chunk_tokens, num_tokens))
        hidden_CD = hidden_TD[chunk]
        logits_CV = logits[: hidden_CD.shape[0]]
        torch.mm(hidden_CD, weight_VD.T, out=logits_CV)
        softmax(logits_CV, labels_T[chunk], losses_T[chunk], options.scale, options.softcap, want_grad)
        if grad_TD is not None:
            torch.mm(logits_CV, weight_VD, out=grad_TD[chunk])
        if grad_weight_VD is not None:
            add_product(grad_weight_VD, logits_CV.T, hidden_CD, first=start == 0)
    if num_tokens == 0 and grad_weight_VD is not None:
        grad_weight_VD.zero_()
    if rows_T is not None and grad_hidden_TD is not None and grad_TD is not None:
        grad_hidden_TD.zero_().index_copy_(0, rows_T, grad_TD)
    return losses_T.sum()


def _kept_rows(labels_T: torch.Tensor) -> torch.Tensor | None:
    """The rows that are not ignored, None for all; counting them on a GPU would be a host sync."""
    if labels_T.device.type != "cpu":
        return None
    keep_T = labels_T != IGNORE_INDEX
    return None if bool(keep_T.all()) else keep_T.nonzero().squeeze(1)


def _add_product(out: torch.Tensor, left: torch.Tensor, right: torch.Tensor, *, first: bool) -> None:
    """out += left @ right with fp32 accumulation in one GEMM; `first` overwrites."""
    if left.dtype == out.dtype or not out.is_cuda:  # a CPU, under the interpreter, has no mm with another out dtype
        left, right = left.to(out.dtype), right.to(out.dtype)
        torch.addmm(out, left, right, beta=0.0 if first else 1.0, out=out)
    elif first:
        torch.mm(left, right, out_dtype=out.dtype, out=out)
    else:
        torch.addmm(out, left, right, out_dtype=out.dtype, out=out)


def _scaled(grad: torch.Tensor, factor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """grad * factor in `dtype`, in place if that is its own dtype; a factor of 1 is then free on a GPU."""
    if not available(grad) or grad.dtype == torch.float64:
        return grad.mul_(factor).to(dtype)
    out = grad if dtype == grad.dtype else torch.empty_like(grad, dtype=dtype)
    if grad.numel():
        scale_kernel[(-(-grad.numel() // SCALE_BLOCK),)](
            grad, factor, out, grad.numel(), IN_PLACE=out is grad, BLOCK=SCALE_BLOCK, num_warps=4
        )
    return out


@jit
def scale_kernel(x_ptr, factor_ptr, out_ptr, num_elements, IN_PLACE: tl.constexpr, BLOCK: tl.constexpr):
    """out = x * factor; does nothing if they are the same tensor and the factor is 1."""
    factor = tl.load(factor_ptr).to(tl.float32)
    if IN_PLACE:  # noqa: SIM102 - the first condition is known at compile time
        if factor == 1.0:
            return
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + index, mask=index < num_elements).to(tl.float32)
    tl.store(out_ptr + index, rounded(x * factor, out_ptr.dtype.element_ty), mask=index < num_elements)
