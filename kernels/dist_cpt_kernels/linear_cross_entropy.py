"""Cross-entropy of a linear head without the full logits, its gradient formed in the forward pass.

T tokens, D model, V vocab, C tokens of one chunk, R rows of one softmax block, S slice of the vocabulary.

For every chunk: z = h W^T (compute dtype), p = softmax(z) (fp32), dz = scale * (p - onehot(y)), then
dh = dz W and dW += dz^T h (fp32 across chunks). That is 6 T D V FLOPs, 4 with a frozen head, and nothing is
computed again in the backward pass. The element of the true class is formed as expm1(log p_y) in fp32: a
bf16 p_y = 0.999 minus one would keep no correct digit.

Chunk sizes are constants, so that a run computes the same bits whatever memory happens to be free. A chunk
reads and writes the fp32 dW once, so it must be long enough for its GEMM to hide that traffic.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from dist_cpt_kernels.cross_entropy import Terms, as_scalar, can_fuse, check_range, cross_entropy_in_place
from dist_cpt_kernels.dispatch import available, jit, tl
from dist_cpt_kernels.rounding import rounded

_CHUNK_TOKENS_CPU = 1024
_CHUNK_TOKENS_GPU = 2048  # above about 750 tokens dW's GEMM outweighs its 8 V D bytes of traffic on an H200
_BLOCK_ELEMENTS_CPU = 2**20  # fp32 softmax block of 4 MiB: stays in cache through its six passes
_BLOCK_ELEMENTS_GPU = 2**27
_VOCAB_SLICE = 4096  # rows of dW computed at once on the CPU, so that its temporary stays small
SCALE_BLOCK = 4096


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    scale: float | torch.Tensor = 1.0,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    chunk_tokens: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(scale * loss_sum, loss_sum): the summed cross-entropy of logits `hidden @ weight.T`.

    With `label_smoothing`, `z_loss` and `softcap` as `Terms` says; they are part of both sums.

    `hidden` [T, D] sets the compute dtype (autocast's where it is on), `weight` [V, D] may have another,
    `labels` int64 [T]. Both results are fp32 scalars (fp64 for fp64 inputs); the first is differentiable, the
    second detached. Rows with `ignore_index` add nothing; with no other row the loss is 0 and so are the
    gradients. The full logits [T, V] never exist. Gradients are formed only for inputs that need them. `scale` is
    a number or one element on the device; no argument is read by the host, but for the CPU's check of labels. A
    label outside [0, V) on a GPU makes loss and gradients NaN.

    Raises:
        ValueError: shapes that do not fit, or (on the CPU) a label outside [0, V).
    """
    terms = Terms(ignore_index, label_smoothing, z_loss, softcap)
    _check(hidden, weight, labels, ignore_index, chunk_tokens)
    if torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    if chunk_tokens is None:
        chunk_tokens = _CHUNK_TOKENS_CPU if hidden.device.type == "cpu" else _CHUNK_TOKENS_GPU
    with torch.autocast(hidden.device.type, enabled=False):
        return _LinearCrossEntropy.apply(hidden, weight, labels, scale, terms, chunk_tokens, torch.is_grad_enabled())


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        scale: float | torch.Tensor,
        terms: Terms,
        chunk_tokens: int,
        grad_enabled: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # needs_input_grad is True for a leaf even under no_grad
        need_hidden, need_weight = (need and grad_enabled for need in ctx.needs_input_grad[:2])
        sums = _accumulate(hidden, weight, labels, scale, terms, chunk_tokens, need_hidden, need_weight)
        ctx.weight_dtype = weight.dtype
        ctx.has = (need_hidden, need_weight)
        ctx.save_for_backward(sums.grad_hidden, sums.grad_weight)
        ctx.mark_non_differentiable(sums.loss)
        return sums.loss * scale, sums.loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        # With retain_graph a later backward needs them unscaled.
        if torch._C._autograd._get_current_graph_task_keep_graph():  # type: ignore[attr-defined]
            grad_hidden, grad_weight = (g if g is None else g.clone() for g in (grad_hidden, grad_weight))
        if grad_hidden is not None:
            grad_hidden = _scaled(grad_hidden, grad_outputs[0], grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = _scaled(grad_weight, grad_outputs[0], ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None, None, None, None


def _scaled(grad: torch.Tensor, factor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """grad * factor in `dtype`, over `grad` where that is its own; on a GPU a factor of 1 then costs nothing."""
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
    """out = x * factor; nothing to do where they are one tensor and the factor is 1."""
    factor = tl.load(factor_ptr).to(tl.float32)
    if IN_PLACE:  # noqa: SIM102 - the first is known when the kernel is compiled
        if factor == 1.0:
            return
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + index, mask=index < num_elements).to(tl.float32)
    tl.store(out_ptr + index, rounded(x * factor, out_ptr.dtype.element_ty), mask=index < num_elements)


@dataclass
class _Sums:
    loss: torch.Tensor  # [] fp32
    grad_hidden: torch.Tensor | None  # [T, D] compute dtype
    grad_weight: torch.Tensor | None  # [V, D] fp32


def _accumulate(
    hidden_TD: torch.Tensor,
    weight_VD: torch.Tensor,
    labels_T: torch.Tensor,
    scale: float | torch.Tensor,
    terms: Terms,
    chunk_tokens: int,
    need_hidden: bool,
    need_weight: bool,
) -> _Sums:
    compute = hidden_TD.dtype
    accumulate = torch.promote_types(compute, torch.float32)
    weight_VD = weight_VD.to(compute)
    rows_T: torch.Tensor | None = None
    all_hidden_TD = hidden_TD
    if hidden_TD.device.type == "cpu":  # ignored rows cost nothing; on a GPU counting them is a host sync
        keep_T = labels_T != terms.ignore_index
        if not bool(keep_T.all()):
            rows_T = keep_T.nonzero().squeeze(1)
            hidden_TD, labels_T = hidden_TD[rows_T], labels_T[rows_T]

    (num_tokens, dim), vocab = hidden_TD.shape, weight_VD.shape[0]
    losses_T = hidden_TD.new_empty(num_tokens, dtype=accumulate)
    grad_TD = torch.empty_like(hidden_TD) if need_hidden else None
    grad_VD = hidden_TD.new_empty((vocab, dim), dtype=accumulate) if need_weight else None
    logits = hidden_TD.new_empty((min(chunk_tokens, num_tokens), vocab))
    fused = can_fuse(logits)
    blocks = None if fused else _Blocks(logits, accumulate)
    device_scale = as_scalar(scale, logits.device) if fused else None
    product = _Product(grad_VD, compute) if grad_VD is not None else None
    for start in range(0, num_tokens, chunk_tokens):
        chunk = slice(start, min(start + chunk_tokens, num_tokens))
        hidden_CD, labels_C = hidden_TD[chunk], labels_T[chunk]
        logits_CV = logits[: hidden_CD.shape[0]]
        torch.mm(hidden_CD, weight_VD.T, out=logits_CV)
        want_grad = need_hidden or need_weight
        if device_scale is not None:
            cross_entropy_in_place(logits_CV, labels_C, losses_T[chunk], device_scale, terms, want_grad)
        elif blocks is not None:
            _softmax_in_place(logits_CV, labels_C, losses_T[chunk], blocks, scale, terms, want_grad)
        if grad_TD is not None:
            torch.mm(logits_CV, weight_VD, out=grad_TD[chunk])
        if grad_VD is not None and product is not None:
            _add_weight_gradient(grad_VD, logits_CV, hidden_CD, product, first=start == 0)
    if num_tokens == 0 and grad_VD is not None:
        grad_VD.zero_()
    if rows_T is not None and grad_TD is not None:
        grad_TD = torch.zeros_like(all_hidden_TD).index_copy_(0, rows_T, grad_TD)
    return _Sums(losses_T.sum(), grad_TD, grad_VD)


class _Blocks:
    """Two fp32 buffers [R, V] for the softmax of R rows at a time; in fp32 the logits are their own first."""

    def __init__(self, logits_CV: torch.Tensor, dtype: torch.dtype) -> None:
        elements = _BLOCK_ELEMENTS_CPU if logits_CV.device.type == "cpu" else _BLOCK_ELEMENTS_GPU
        num_rows, vocab = logits_CV.shape
        self.rows = max(1, min(num_rows, elements // vocab))
        self.z_RV = None if logits_CV.dtype == dtype else logits_CV.new_empty((self.rows, vocab), dtype=dtype)
        self.p_RV = logits_CV.new_empty((self.rows, vocab), dtype=dtype)


def _softmax_in_place(
    logits_CV: torch.Tensor,
    labels_C: torch.Tensor,
    losses_C: torch.Tensor,
    blocks: _Blocks,
    scale: float | torch.Tensor,
    terms: Terms,
    want_grad: bool,
) -> None:
    """Write each row's loss to `losses_C`, and scale * its gradient over the logits if one is wanted.

    With s = label_smoothing and l = logsumexp(z): dz = p (1 + 2 z_loss l) - s / V, at the true class
    expm1(log p) + 2 z_loss l p + s - s / V, and dlogits = dz (1 - (z / softcap)^2).
    """
    smooth, z_loss, softcap, vocab = terms.label_smoothing, terms.z_loss, terms.softcap, logits_CV.shape[1]
    for start in range(0, logits_CV.shape[0], blocks.rows):
        z_RV, labels_R = logits_CV[start : start + blocks.rows], labels_C[start : start + blocks.rows]
        num = z_RV.shape[0]
        p_RV = blocks.p_RV[:num]
        z32_RV = z_RV if blocks.z_RV is None else blocks.z_RV[:num].copy_(z_RV)
        if softcap is not None:
            z32_RV.div_(softcap).tanh_().mul_(softcap)
        torch.log_softmax(z32_RV, -1, out=p_RV)
        keep_R1 = (labels_R != terms.ignore_index).unsqueeze(1)
        index_R1 = labels_R.unsqueeze(1).where(keep_R1, 0)
        log_p_R1 = p_RV.gather(1, index_R1)
        # where, not a product: an ignored row may have log p = -inf
        loss_R1, lse_R1 = -log_p_R1, z32_RV.gather(1, index_R1) - log_p_R1
        if smooth:
            loss_R1 = (1 - smooth) * loss_R1 - smooth * p_RV.mean(1, keepdim=True)
        if z_loss:
            loss_R1 = loss_R1 + z_loss * lse_R1**2
        losses_C[start : start + num] = torch.where(keep_R1, loss_R1, 0.0).squeeze(1)
        if want_grad:
            p_RV.exp_()
            true_R1 = log_p_R1.expm1()
            if z_loss or smooth:
                true_R1 = true_R1 + 2 * z_loss * lse_R1 * log_p_R1.exp() + (smooth - smooth / vocab)
                p_RV.mul_(1 + 2 * z_loss * lse_R1).sub_(smooth / vocab)
            p_RV.scatter_(1, index_R1, true_R1)
            if softcap is not None:
                p_RV.mul_(z32_RV.div_(softcap).square_().neg_().add_(1.0))
            p_RV.mul_(keep_R1.to(p_RV.dtype) * scale)
            z_RV.copy_(p_RV)  # a product that casts its result is several times slower on a CPU


class _Product:
    """Buffers [S, D] for a slice of dW on the CPU, in two dtypes: fresh memory is paged in each time, at a cost."""

    def __init__(self, grad_VD: torch.Tensor, compute: torch.dtype) -> None:
        shape = (min(_VOCAB_SLICE, grad_VD.shape[0]), grad_VD.shape[1])
        needed = grad_VD.dtype != compute and not grad_VD.is_cuda
        self.narrow_SD = grad_VD.new_empty(shape, dtype=compute) if needed else None
        self.wide_SD = grad_VD.new_empty(shape) if needed else None


def _add_weight_gradient(
    grad_VD: torch.Tensor, dlogits_CV: torch.Tensor, hidden_CD: torch.Tensor, product: _Product, *, first: bool
) -> None:
    """grad += dlogits^T hidden with fp32 accumulation: one GEMM on a GPU, a slice of the vocabulary at a time else."""
    if grad_VD.is_cuda and grad_VD.dtype != dlogits_CV.dtype:
        if first:
            torch.mm(dlogits_CV.T, hidden_CD, out_dtype=grad_VD.dtype, out=grad_VD)
        else:
            torch.addmm(grad_VD, dlogits_CV.T, hidden_CD, out_dtype=grad_VD.dtype, out=grad_VD)
        return
    for start in range(0, grad_VD.shape[0], _VOCAB_SLICE):
        target_SD = grad_VD[start : start + _VOCAB_SLICE]
        dlogits_SC = dlogits_CV[:, start : start + _VOCAB_SLICE].T
        if product.narrow_SD is None or product.wide_SD is None:
            torch.addmm(target_SD, dlogits_SC, hidden_CD, beta=0.0 if first else 1.0, out=target_SD)
            continue
        product_SD = torch.mm(dlogits_SC, hidden_CD, out=product.narrow_SD[: target_SD.shape[0]])
        if first:
            target_SD.copy_(product_SD)
        else:  # adding another dtype is several times slower
            target_SD.add_(product.wide_SD[: target_SD.shape[0]].copy_(product_SD))


def _check(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    ignore_index: int,
    chunk_tokens: int | None,
) -> None:
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden [T, D] and weight [V, D] expected, got {[*hidden.shape]} and {[*weight.shape]}")
    if labels.shape != hidden.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(f"labels int64 [{hidden.shape[0]}] expected, got {labels.dtype} {[*labels.shape]}")
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be positive, got {chunk_tokens}")
    check_range(labels, weight.shape[0], ignore_index)
