"""The chunked loss of `linear_cross_entropy` in plain torch: on a CPU, in fp64, and without Triton.

T tokens, D model, V vocab, C tokens of one chunk, R rows of one softmax block, S slice of the vocabulary.

The gradient of the true class is expm1(log p_y) in fp32: a bf16 p_y = 0.999 minus one would keep no correct digit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dist_cpt_kernels.cross_entropy import Terms

CHUNK_TOKENS = 1024
_BLOCK_ELEMENTS = 2**20  # fp32 softmax block of 4 MiB: stays in a CPU's cache through its six passes
_VOCAB_SLICE = 4096  # rows of dW computed at once, so that the temporary stays small


@dataclass(frozen=True)
class Gradients:
    """Buffers for the gradients that are wanted, else None."""

    hidden_TD: torch.Tensor | None  # compute dtype
    weight_VD: torch.Tensor | None  # fp32, or fp64 for fp64 inputs

    @classmethod
    def empty(cls, hidden: torch.Tensor, weight: torch.Tensor, need_hidden: bool, need_weight: bool) -> Gradients:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        return cls(
            torch.empty_like(hidden) if need_hidden else None,
            hidden.new_empty(weight.shape, dtype=wide) if need_weight else None,
        )

    @property
    def wanted(self) -> bool:
        return self.hidden_TD is not None or self.weight_VD is not None


def accumulate_in_torch(
    hidden_TD: torch.Tensor,
    weight_VD: torch.Tensor,
    labels_T: torch.Tensor,
    scale: float | torch.Tensor,
    terms: Terms,
    chunk_tokens: int | None,
    gradients: Gradients,
) -> torch.Tensor:
    """The loss sum, fp32 [] (fp64 for fp64 inputs); fills `gradients`."""
    rows_T: torch.Tensor | None = None
    if hidden_TD.device.type == "cpu":  # skip ignored rows; counting them on a GPU would be a host sync
        keep_T = labels_T != terms.ignore_index
        if not bool(keep_T.all()):
            rows_T = keep_T.nonzero().squeeze(1)
            hidden_TD, labels_T = hidden_TD[rows_T], labels_T[rows_T]
    grad_TD = gradients.hidden_TD
    if grad_TD is not None and rows_T is not None:
        grad_TD = torch.empty_like(hidden_TD)
    num_tokens, chunk_tokens = hidden_TD.shape[0], chunk_tokens or CHUNK_TOKENS
    wide = torch.promote_types(hidden_TD.dtype, torch.float32)
    losses_T = hidden_TD.new_empty(num_tokens, dtype=wide)
    logits = hidden_TD.new_empty((min(chunk_tokens, num_tokens), weight_VD.shape[0]))
    softmax = _Softmax(logits, wide, scale, terms, gradients.wanted)
    product = None if gradients.weight_VD is None else _WeightGradient(gradients.weight_VD, hidden_TD.dtype)
    for start in range(0, num_tokens, chunk_tokens):
        chunk = slice(start, min(start + chunk_tokens, num_tokens))
        hidden_CD = hidden_TD[chunk]
        logits_CV = logits[: hidden_CD.shape[0]]
        torch.mm(hidden_CD, weight_VD.T, out=logits_CV)
        softmax.in_place(logits_CV, labels_T[chunk], losses_T[chunk])
        if grad_TD is not None:
            torch.mm(logits_CV, weight_VD, out=grad_TD[chunk])
        if product is not None:
            product.add(logits_CV, hidden_CD, first=start == 0)
    if num_tokens == 0 and gradients.weight_VD is not None:
        gradients.weight_VD.zero_()
    if rows_T is not None and grad_TD is not None and gradients.hidden_TD is not None:
        gradients.hidden_TD.zero_().index_copy_(0, rows_T, grad_TD)
    return losses_T.sum()


class _Softmax:
    """Loss and gradient of R rows at a time in two fp32 buffers [R, V]; fp32 logits are their own first buffer."""

    def __init__(
        self, logits_CV: torch.Tensor, wide: torch.dtype, scale: float | torch.Tensor, terms: Terms, want_grad: bool
    ) -> None:
        num_rows, vocab = logits_CV.shape
        self.scale, self.terms, self.want_grad = scale, terms, want_grad
        self.rows = max(1, min(num_rows, _BLOCK_ELEMENTS // vocab))
        self.z_RV = None if logits_CV.dtype == wide else logits_CV.new_empty((self.rows, vocab), dtype=wide)
        self.p_RV = logits_CV.new_empty((self.rows, vocab), dtype=wide)

    def in_place(self, logits_CV: torch.Tensor, labels_C: torch.Tensor, losses_C: torch.Tensor) -> None:
        """Store each row's loss in `losses_C`, and scale * its gradient in the logits if one is wanted.

        With s = label_smoothing and l = logsumexp(z): dz = p (1 + 2 z_loss l) - s / V, at the true class
        expm1(log p) + 2 z_loss l p + s - s / V, and dlogits = dz (1 - (z / softcap)^2).
        """
        terms, vocab = self.terms, logits_CV.shape[1]
        smooth, z_loss, softcap = terms.label_smoothing, terms.z_loss, terms.softcap
        for start in range(0, logits_CV.shape[0], self.rows):
            z_RV, labels_R = logits_CV[start : start + self.rows], labels_C[start : start + self.rows]
            num = z_RV.shape[0]
            p_RV = self.p_RV[:num]
            z32_RV = z_RV if self.z_RV is None else self.z_RV[:num].copy_(z_RV)
            if softcap is not None:
                z32_RV.div_(softcap).tanh_().mul_(softcap)
            torch.log_softmax(z32_RV, -1, out=p_RV)
            keep_R1 = (labels_R != terms.ignore_index).unsqueeze(1)
            index_R1 = labels_R.unsqueeze(1).where(keep_R1, 0)
            log_p_R1 = p_RV.gather(1, index_R1)
            loss_R1, lse_R1 = -log_p_R1, z32_RV.gather(1, index_R1) - log_p_R1
            if smooth:
                loss_R1 = (1 - smooth) * loss_R1 - smooth * p_RV.mean(1, keepdim=True)
            if z_loss:
                loss_R1 = loss_R1 + z_loss * lse_R1**2
            # where, not a product: an ignored row may have log p = -inf
            losses_C[start : start + num] = torch.where(keep_R1, loss_R1, 0.0).squeeze(1)
            if self.want_grad:
                p_RV.exp_()
                true_R1 = log_p_R1.expm1()
                if z_loss or smooth:
                    true_R1 = true_R1 + 2 * z_loss * lse_R1 * log_p_R1.exp() + (smooth - smooth / vocab)
                    p_RV.mul_(1 + 2 * z_loss * lse_R1).sub_(smooth / vocab)
                p_RV.scatter_(1, index_R1, true_R1)
                if softcap is not None:
                    p_RV.mul_(z32_RV.div_(softcap).square_().neg_().add_(1.0))
                p_RV.mul_(keep_R1.to(p_RV.dtype) * self.scale)
                z_RV.copy_(p_RV)  # a multiplication that also casts is several times slower on a CPU


class _WeightGradient:
    """dW += dlogits^T hidden, a slice [S, D] of the vocabulary at a time, in reused buffers of both dtypes."""

    def __init__(self, grad_VD: torch.Tensor, compute: torch.dtype) -> None:
        self.grad_VD = grad_VD
        self.narrow_SD = self.wide_SD = None
        if grad_VD.dtype != compute:
            shape = (min(_VOCAB_SLICE, grad_VD.shape[0]), grad_VD.shape[1])
            self.narrow_SD, self.wide_SD = grad_VD.new_empty(shape, dtype=compute), grad_VD.new_empty(shape)

    def add(self, dlogits_CV: torch.Tensor, hidden_CD: torch.Tensor, *, first: bool) -> None:
        for start in range(0, self.grad_VD.shape[0], _VOCAB_SLICE):
            target_SD = self.grad_VD[start : start + _VOCAB_SLICE]
            dlogits_SC = dlogits_CV[:, start : start + _VOCAB_SLICE].T
            if self.narrow_SD is None or self.wide_SD is None:
                torch.addmm(target_SD, dlogits_SC, hidden_CD, beta=0.0 if first else 1.0, out=target_SD)
                continue
            product_SD = torch.mm(dlogits_SC, hidden_CD, out=self.narrow_SD[: target_SD.shape[0]])
            if first:
                target_SD.copy_(product_SD)
            else:  # adding a tensor of another dtype is several times slower
                target_SD.add_(self.wide_SD[: target_SD.shape[0]].copy_(product_SD))
