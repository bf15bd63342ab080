"""Cross-entropy of the logits of one chunk: one pass over a row for the sums of its softmax, one for its gradient.

T tokens, V vocab.

Per row the kernel keeps the largest logit m and the sum s of exp(z - m) over all classes **except the true one**.
Thus p_y - 1 = -s / (s + exp(z_y - m)) keeps its precision however confident the model is, where a rounded p_y minus
one would lose it, and the loss is (m - z_y) + log1p(...), a sum of two non-negative numbers. All arithmetic is fp32,
rounded once at the store.
Source: Milakov and Gimelshein, Online normalizer calculation for softmax, algorithm 3.
"""

from __future__ import annotations

import torch

from dist_cpt_kernels.dispatch import jit, tl
from dist_cpt_kernels.reference import IGNORE_INDEX
from dist_cpt_kernels.rounding import rounded

BLOCK = 8192  # logits per iteration: 16 for each of 512 threads, so that no register spills
NUM_WARPS = 16


def cross_entropy_in_place(
    logits: torch.Tensor,
    labels: torch.Tensor,
    losses: torch.Tensor,
    scale: float,
    softcap: float | None,
    want_grad: bool,
) -> None:
    """Store each row's loss in `losses` fp32 [T], and with `want_grad` scale * its gradient in `logits`.

    One launch: the second read of a row finds most of it in the cache. `logits` [T, V] and `labels` int64 [T] are
    contiguous. Ignored rows have zero loss and gradient; a label outside [0, V) gives NaN.
    """
    if labels.numel():
        cap = 1.0 if softcap is None else softcap
        cross_entropy_kernel[(labels.shape[0],)](
            logits, labels, losses, logits.shape[1], IGNORE_INDEX, scale, cap, 1.0 / cap,
            WANT_GRAD=want_grad, SOFTCAP=softcap is not None, BLOCK=BLOCK, num_warps=NUM_WARPS,
        )  # fmt: skip


@jit
def cross_entropy_kernel(
    logits_ptr, labels_ptr, losses_ptr, vocab, ignore_index, scale, softcap, inverse_softcap,
    WANT_GRAD: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program computes one row."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * vocab
    label = tl.load(labels_ptr + row)
    kept = label != ignore_index
    inside = (label >= 0) & (label < vocab)
    x_true = tl.load(logits_ptr + label, mask=inside, other=float("nan")).to(tl.float32)
    z_true, slope_true = _capped(x_true, softcap, inverse_softcap, SOFTCAP)
    label = tl.where(inside, label, -1).to(tl.int32)
    length = tl.where(kept, vocab, 0)  # an ignored row is not read
    top, others = _row_sums(logits_ptr, label, z_true, vocab, length, softcap, inverse_softcap, SOFTCAP, BLOCK)
    e_true = tl.exp(z_true - top)
    total = others + e_true
    loss = (top - z_true) + _log1p(tl.where(top == z_true, others, total - 1.0))
    tl.store(losses_ptr + row, tl.where(kept, loss, 0.0))

    if WANT_GRAD:
        p_factor = tl.div_rn(1.0, total)
        for start in range(0, vocab, BLOCK):
            index = start + tl.arange(0, BLOCK)
            x = tl.load(logits_ptr + index, mask=index < length, other=0.0).to(tl.float32)
            z, slope = _capped(x, softcap, inverse_softcap, SOFTCAP)
            d = tl.exp(z - top) * p_factor * slope * scale
            # where, not a product: an ignored row may contain NaN
            d = rounded(tl.where(kept, d, 0.0), logits_ptr.dtype.element_ty)
            tl.store(logits_ptr + index, d, mask=index < vocab)
        p_true = tl.div_rn(e_true, total)
        # p - 1, using the form that rounds less
        d_true = tl.where(p_true < 0.5, p_true - 1.0, -tl.div_rn(others, total))
        if SOFTCAP:  # near zero 1 - tanh^2 rounds less, which shows where p - 1 is large
            t_true = z_true * inverse_softcap
            d_true *= tl.where(tl.abs(t_true) < 0.5, 1.0 - t_true * t_true, slope_true)
        tl.debug_barrier()  # the warp that has this class in its block has stored p there
        tl.store(logits_ptr + label, rounded(d_true * scale, logits_ptr.dtype.element_ty), mask=kept & (label >= 0))


@jit
def _row_sums(
    logits_ptr, label, z_true, vocab, length, softcap, inverse_softcap, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr
):
    """(largest logit, sum of exp(z - largest) without the true class)."""
    top = z_true
    others = tl.zeros([BLOCK], tl.float32)
    for start in range(0, length, BLOCK):
        index = start + tl.arange(0, BLOCK)
        other_class = (index < vocab) & (index != label)
        x = tl.load(logits_ptr + index, mask=index < vocab, other=0.0).to(tl.float32)
        z, _ = _capped(x, softcap, inverse_softcap, SOFTCAP)
        z = tl.where(other_class, z, float("-inf"))
        new_top = tl.maximum(top, tl.max(z, 0))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)  # no finite logit so far: -inf - -inf is NaN
        others = others * tl.exp(top - base) + tl.exp(z - base)
        top = new_top
    return top, tl.sum(others, 0)


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
