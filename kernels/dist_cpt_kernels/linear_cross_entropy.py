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

_CHUNK_TOKENS_CPU = 1024
_CHUNK_TOKENS_GPU = 2048  # above about 750 tokens dW's GEMM outweighs its 8 V D bytes of traffic on an H200
_BLOCK_ELEMENTS_CPU = 2**20  # fp32 softmax block of 4 MiB: stays in cache through its six passes
_BLOCK_ELEMENTS_GPU = 2**27
_VOCAB_SLICE = 4096  # rows of dW computed at once, so that its temporary stays small


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    scale: float = 1.0,
    ignore_index: int = -100,
    chunk_tokens: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(scale * loss_sum, loss_sum): the summed cross-entropy of logits `hidden @ weight.T`.

    `hidden` [T, D] sets the compute dtype (autocast's where it is on), `weight` [V, D] may have another,
    `labels` int64 [T]. Both results are fp32 scalars (fp64 for fp64 inputs); the first is differentiable, the
    second detached. Rows with `ignore_index` add nothing; with no other row the loss is 0 and so are the
    gradients. The full logits [T, V] never exist. Gradients are formed only for inputs that need them.

    Raises:
        ValueError: shapes that do not fit, or (on the CPU) a label outside [0, V).
    """
    _check(hidden, weight, labels, ignore_index, chunk_tokens)
    if torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    if chunk_tokens is None:
        chunk_tokens = _CHUNK_TOKENS_CPU if hidden.device.type == "cpu" else _CHUNK_TOKENS_GPU
    with torch.autocast(hidden.device.type, enabled=False):
        return _LinearCrossEntropy.apply(
            hidden, weight, labels, scale, ignore_index, chunk_tokens, torch.is_grad_enabled()
        )


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        scale: float,
        ignore_index: int,
        chunk_tokens: int,
        grad_enabled: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # needs_input_grad is True for a leaf even under no_grad
        need_hidden, need_weight = (need and grad_enabled for need in ctx.needs_input_grad[:2])
        sums = _accumulate(hidden, weight, labels, scale, ignore_index, chunk_tokens, need_hidden, need_weight)
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
        for grad in (grad_hidden, grad_weight):
            if grad is not None:
                grad.mul_(grad_outputs[0])
        if grad_weight is not None:
            grad_weight = grad_weight.to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None, None, None, None


@dataclass
class _Sums:
    loss: torch.Tensor  # [] fp32
    grad_hidden: torch.Tensor | None  # [T, D] compute dtype
    grad_weight: torch.Tensor | None  # [V, D] fp32


def _accumulate(
    hidden_TD: torch.Tensor,
    weight_VD: torch.Tensor,
    labels_T: torch.Tensor,
    scale: float,
    ignore_index: int,
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
        keep_T = labels_T != ignore_index
        if not bool(keep_T.all()):
            rows_T = keep_T.nonzero().squeeze(1)
            hidden_TD, labels_T = hidden_TD[rows_T], labels_T[rows_T]

    (num_tokens, dim), vocab = hidden_TD.shape, weight_VD.shape[0]
    losses_T = hidden_TD.new_empty(num_tokens, dtype=accumulate)
    grad_TD = torch.empty_like(hidden_TD) if need_hidden else None
    grad_VD = hidden_TD.new_empty((vocab, dim), dtype=accumulate) if need_weight else None
    logits = hidden_TD.new_empty((min(chunk_tokens, num_tokens), vocab))
    blocks = _Blocks(logits, accumulate)
    product = _Product(grad_VD, compute) if grad_VD is not None else None
    for start in range(0, num_tokens, chunk_tokens):
        chunk = slice(start, min(start + chunk_tokens, num_tokens))
        hidden_CD, labels_C = hidden_TD[chunk], labels_T[chunk]
        logits_CV = logits[: hidden_CD.shape[0]]
        torch.mm(hidden_CD, weight_VD.T, out=logits_CV)
        want_grad = need_hidden or need_weight
        _softmax_in_place(logits_CV, labels_C, losses_T[chunk], blocks, scale, ignore_index, want_grad)
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
    scale: float,
    ignore_index: int,
    want_grad: bool,
) -> None:
    """Write each row's loss to `losses_C`, and scale * (p - onehot) over the logits if a gradient is wanted."""
    for start in range(0, logits_CV.shape[0], blocks.rows):
        z_RV, labels_R = logits_CV[start : start + blocks.rows], labels_C[start : start + blocks.rows]
        num = z_RV.shape[0]
        p_RV = blocks.p_RV[:num]
        z32_RV = z_RV if blocks.z_RV is None else blocks.z_RV[:num].copy_(z_RV)
        torch.log_softmax(z32_RV, -1, out=p_RV)
        keep_R1 = (labels_R != ignore_index).unsqueeze(1)
        index_R1 = labels_R.unsqueeze(1).where(keep_R1, 0)
        log_p_R1 = p_RV.gather(1, index_R1)
        # where, not a product: an ignored row may have log p = -inf
        losses_C[start : start + num] = torch.where(keep_R1, -log_p_R1, 0.0).squeeze(1)
        if want_grad:
            p_RV.exp_().scatter_(1, index_R1, log_p_R1.expm1())
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
    """grad += dlogits^T hidden with fp32 accumulation, a slice of the vocabulary at a time."""
    for start in range(0, grad_VD.shape[0], _VOCAB_SLICE):
        target_SD = grad_VD[start : start + _VOCAB_SLICE]
        dlogits_SC = dlogits_CV[:, start : start + _VOCAB_SLICE].T
        if dlogits_SC.dtype == target_SD.dtype:
            torch.addmm(target_SD, dlogits_SC, hidden_CD, beta=0.0 if first else 1.0, out=target_SD)
            continue
        if product.narrow_SD is None or product.wide_SD is None:
            product_SD = torch.mm(dlogits_SC, hidden_CD, out_dtype=target_SD.dtype)
        else:
            product_SD = torch.mm(dlogits_SC, hidden_CD, out=product.narrow_SD[: target_SD.shape[0]])
            if not first:  # adding another dtype is several times slower
                product_SD = product.wide_SD[: target_SD.shape[0]].copy_(product_SD)
        if first:
            target_SD.copy_(product_SD)
        else:
            target_SD.add_(product_SD)


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
    if labels.device.type == "cpu" and labels.numel():
        outside = (labels != ignore_index) & ((labels < 0) | (labels >= weight.shape[0]))
        if bool(outside.any()):
            bad = int(labels[outside][0])
            raise ValueError(f"label {bad} lies outside the head's {weight.shape[0]} rows")
