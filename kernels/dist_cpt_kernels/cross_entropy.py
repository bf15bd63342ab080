"""Cross-entropy of given logits: one pass over a row for the sums of its softmax, one for its gradient.

T tokens, V vocab.

Per row the kernel keeps the largest logit m and the sum s of exp(z - m) over all classes **except the true one**.
Thus p_y - 1 = -s / (s + exp(z_y - m)) keeps its precision however confident the model is, where a rounded p_y minus
one would lose it, and the loss is (m - z_y) + log1p(...), a sum of two non-negative numbers. All arithmetic is fp32,
rounded once at the store.
Source: Milakov and Gimelshein, Online normalizer calculation for softmax, algorithm 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from dist_cpt_kernels import reference
from dist_cpt_kernels.dispatch import can_fuse, jit, tl
from dist_cpt_kernels.rounding import rounded

BLOCK = 8192  # logits per iteration: 16 for each of 512 threads, so that no register spills
NUM_WARPS = 16


@dataclass(frozen=True)
class Terms:
    """The terms of a row's loss: (1 - e) nll + e mean(-log p) + z_loss * logsumexp(z)^2.

    e is `label_smoothing`, and z = softcap * tanh(logits / softcap) if `softcap` is set.
    Source: z-loss, Chowdhery et al., PaLM, section 5; softcap, Gemma 2, section 2.
    """

    ignore_index: int = -100
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.label_smoothing < 1.0:
            raise ValueError(f"label_smoothing: expected a value in [0, 1), got {self.label_smoothing}")
        if self.z_loss < 0.0:
            raise ValueError(f"z_loss: expected a value >= 0, got {self.z_loss}")
        if self.softcap is not None and self.softcap <= 0.0:
            raise ValueError(f"softcap: expected a positive value or None, got {self.softcap}")


def cross_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    scale: float | torch.Tensor = 1.0,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    overwrite_logits: bool = False,
) -> torch.Tensor:
    """scale * loss of each token, fp32 [T], of `logits` [T, V] and `labels` int64 [T].

    Rows with `ignore_index` have zero loss and gradient; a label outside [0, V) gives NaN on a GPU. `scale` is a
    number or a one-element tensor, which causes no host sync. With `overwrite_logits` the backward pass stores the
    gradient in the logits: only for a caller that owns them and does not read them again.

    Raises:
        ValueError: shapes or dtypes do not match, or (on the CPU) a label is outside [0, V).
    """
    terms = Terms(ignore_index, label_smoothing, z_loss, softcap)
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(
            f"expected logits [T, V] and labels int64 [T], got {[*logits.shape]} and {labels.dtype} {[*labels.shape]}"
        )
    check_range(labels, logits.shape[1], ignore_index)
    if not can_fuse(logits):
        return reference.cross_entropy(
            logits,
            labels,
            scale=scale,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            softcap=softcap,
        )
    return _CrossEntropy.apply(logits, labels, as_scalar(scale, logits.device), terms, overwrite_logits)


def as_scalar(value: float | torch.Tensor, device: torch.device) -> torch.Tensor:
    """`value` as one fp32 element on `device`, without a host sync."""
    if isinstance(value, torch.Tensor):
        return value.detach().to(device, torch.float32).reshape(())
    return torch.full((), value, dtype=torch.float32, device=device)


def check_range(labels: torch.Tensor, vocab: int, ignore_index: int) -> None:
    """Check labels on the CPU; on a GPU that would be a host sync.

    Raises:
        ValueError: a label is neither `ignore_index` nor in [0, vocab).
    """
    if labels.device.type == "cpu" and labels.numel():
        outside = (labels != ignore_index) & ((labels < 0) | (labels >= vocab))
        if bool(outside.any()):
            raise ValueError(f"labels: expected 0 to {vocab - 1} or {ignore_index}, got {int(labels[outside][0])}")


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, labels: torch.Tensor, scale: torch.Tensor, terms: Terms, overwrite: bool
    ) -> torch.Tensor:
        logits, labels = logits.contiguous(), labels.contiguous()
        losses = torch.empty(labels.shape, dtype=torch.float32, device=logits.device)
        sums = torch.empty((2, *labels.shape), dtype=torch.float32, device=logits.device)
        _launch(logits, labels, losses, sums, scale, None, None, terms)
        ctx.save_for_backward(logits, labels, sums, scale)
        ctx.terms, ctx.overwrite = terms, overwrite
        return losses

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        logits, labels, sums, scale = ctx.saved_tensors
        grad = logits if ctx.overwrite else torch.empty_like(logits)
        _launch(logits, labels, None, sums, scale, grad_outputs[0].contiguous(), grad, ctx.terms)
        return grad, None, None, None, None


def cross_entropy_in_place(
    logits: torch.Tensor, labels: torch.Tensor, losses: torch.Tensor, scale: torch.Tensor, terms: Terms, want_grad: bool
) -> None:
    """Store each row's unscaled loss in `losses` fp32 [T], and with `want_grad` scale * its gradient in `logits`.

    One launch: the second read of a row finds most of it in the cache. `logits` [T, V] and `labels` are contiguous.
    """
    _launch(logits, labels, losses, None, scale, None, logits if want_grad else None, terms)


def _launch(
    logits: torch.Tensor,
    labels: torch.Tensor,
    losses: torch.Tensor | None,
    sums: torch.Tensor | None,
    scale: torch.Tensor,
    upstream: torch.Tensor | None,
    grad: torch.Tensor | None,
    terms: Terms,
) -> None:
    """Without `sums` the losses are unscaled, as in a fused call; without `losses` the sums are read, not written."""
    if not labels.numel():
        return
    softcap = 1.0 if terms.softcap is None else terms.softcap
    share = terms.label_smoothing / logits.shape[1]
    cross_entropy_kernel[(labels.shape[0],)](
        logits, labels, losses, sums, scale, upstream, grad, labels.shape[0], logits.shape[1], terms.ignore_index,
        terms.label_smoothing, share, 1.0 - terms.label_smoothing + share, terms.z_loss, softcap, 1.0 / softcap,
        READ_SUMS=losses is None, SCALE_LOSS=sums is not None, SMOOTH=terms.label_smoothing > 0.0,
        SOFTCAP=terms.softcap is not None, BLOCK=BLOCK, num_warps=NUM_WARPS,
    )  # fmt: skip


@jit
def cross_entropy_kernel(
    logits_ptr, labels_ptr, losses_ptr, sums_ptr, scale_ptr, upstream_ptr, grad_ptr, num_tokens, vocab,
    ignore_index, label_smoothing, share, true_share, z_loss, softcap, inverse_softcap,
    READ_SUMS: tl.constexpr, SCALE_LOSS: tl.constexpr, SMOOTH: tl.constexpr, SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program computes one row. A None pointer skips its part."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * vocab
    label = tl.load(labels_ptr + row)
    kept = label != ignore_index
    inside = (label >= 0) & (label < vocab)
    x_true = tl.load(logits_ptr + label, mask=inside, other=float("nan")).to(tl.float32)
    z_true, _ = _capped(x_true, softcap, inverse_softcap, SOFTCAP)
    label = tl.where(inside, label, -1).to(tl.int32)
    length = tl.where(kept, vocab, 0)  # an ignored row is not read
    if READ_SUMS:
        top = tl.load(sums_ptr + row)
        others = tl.load(sums_ptr + num_tokens + row)
        mean = 0.0
    else:
        top, others, mean = _row_sums(
            logits_ptr, label, z_true, vocab, length, softcap, inverse_softcap, SMOOTH, SOFTCAP, BLOCK
        )
    e_true = tl.exp(z_true - top)
    total = others + e_true
    lse = top + tl.log(total)
    scale = tl.load(scale_ptr)

    if losses_ptr is not None:
        loss = (top - z_true) + _log1p(tl.where(top == z_true, others, total - 1.0))
        if SMOOTH:
            loss += label_smoothing * (z_true - mean)
        loss += z_loss * lse * lse
        if SCALE_LOSS:
            loss *= scale
            tl.store(sums_ptr + row, top)
            tl.store(sums_ptr + num_tokens + row, others)
        tl.store(losses_ptr + row, tl.where(kept, loss, 0.0))

    if grad_ptr is not None:
        if upstream_ptr is not None:
            scale *= tl.load(upstream_ptr + row)
        p_true = tl.div_rn(e_true, total)
        # p - 1 + e - e / V, using the form of p - 1 that rounds less
        d_true = tl.where(p_true < 0.5, p_true - true_share, (1.0 - true_share) - tl.div_rn(others, total))
        d_true += 2.0 * z_loss * lse * p_true
        p_factor = tl.div_rn(1.0 + 2.0 * z_loss * lse, total)
        grad_ptr += row * vocab
        if READ_SUMS:
            tl.debug_barrier()  # grad may alias logits: every warp has read the true class by now
        for start in range(0, vocab, BLOCK):
            index = start + tl.arange(0, BLOCK)
            x = tl.load(logits_ptr + index, mask=index < length, other=0.0).to(tl.float32)
            z, slope = _capped(x, softcap, inverse_softcap, SOFTCAP)
            d = tl.where(index == label, d_true, tl.exp(z - top) * p_factor - share) * slope * scale
            # where, not a product: an ignored row may contain NaN
            d = rounded(tl.where(kept, d, 0.0), grad_ptr.dtype.element_ty)
            tl.store(grad_ptr + index, d, mask=index < vocab)


@jit
def _row_sums(
    logits_ptr, label, z_true, vocab, length, softcap, inverse_softcap,
    SMOOTH: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(largest logit, sum of exp(z - largest) without the true class, mean of z)."""
    top = z_true
    others = tl.zeros([BLOCK], tl.float32)
    values = tl.zeros([BLOCK], tl.float32)
    for start in range(0, length, BLOCK):
        index = start + tl.arange(0, BLOCK)
        other_class = (index < vocab) & (index != label)
        x = tl.load(logits_ptr + index, mask=index < vocab, other=0.0).to(tl.float32)
        z, _ = _capped(x, softcap, inverse_softcap, SOFTCAP)
        if SMOOTH:
            values += tl.where(other_class, z, 0.0)
        z = tl.where(other_class, z, float("-inf"))
        new_top = tl.maximum(top, tl.max(z, 0))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)  # no finite logit so far: -inf - -inf is NaN
        others = others * tl.exp(top - base) + tl.exp(z - base)
        top = new_top
    return top, tl.sum(others, 0), (tl.sum(values, 0) + z_true) / vocab


@jit
def _capped(x, softcap, inverse_softcap, SOFTCAP: tl.constexpr):
    """(softcap * tanh(x / softcap), its derivative), or (x, 1).

    A polynomial near zero; elsewhere and for the derivative e = exp(-2 |u|), since 4 e / (1 + e)^2 keeps its
    precision where 1 - tanh(u)^2 loses it.
    Source: the coefficients are those of tanhf in the Cephes library.
    """
    slope = 1.0
    if SOFTCAP:
        u = x * inverse_softcap
        size = tl.abs(u)
        e = tl.exp(-2.0 * size)
        far = 1.0 - 2.0 * e / (1.0 + e)
        w = tl.minimum(u * u, 1.0)  # must not overflow outside the polynomial's range
        poly = -5.70498872745e-3 * w + 2.06390887954e-2
        poly = poly * w - 5.37397155531e-2
        poly = poly * w + 1.33314422036e-1
        poly = poly * w - 3.33332819422e-1
        near = u + u * w * poly
        x = softcap * tl.where(size < 0.625, near, tl.where(u < 0.0, -far, far))
        slope = 4.0 * e / ((1.0 + e) * (1.0 + e))
    return x, slope


@jit
def _log1p(x):
    """log(1 + x) for x >= 0; below 1 by the series of 2 atanh(x / (2 + x)), whose ninth term is below fp32."""
    q = x / (2.0 + x)
    w = q * q
    series = 1.0 / 15.0 + w / 17.0
    series = 1.0 / 13.0 + w * series
    series = 1.0 / 11.0 + w * series
    series = 1.0 / 9.0 + w * series
    series = 1.0 / 7.0 + w * series
    series = 1.0 / 5.0 + w * series
    series = 1.0 / 3.0 + w * series
    series = 1.0 + w * series
    return tl.where(x < 1.0, 2.0 * q * series, tl.log(1.0 + x))
