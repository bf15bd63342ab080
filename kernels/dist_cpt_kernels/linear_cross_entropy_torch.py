"""What a chunk of `linear_cross_entropy` computes, in plain torch: on a CPU, in fp64, and without Triton.

T tokens, D model, V vocab, C tokens of one chunk, R rows of one softmax block, S slice of the vocabulary.

The gradient of the true class is expm1(log p_y) in fp32: a bf16 p_y = 0.999 minus one would keep no correct digit.
"""

from __future__ import annotations

import torch

from dist_cpt_kernels.reference import IGNORE_INDEX

_BLOCK_ELEMENTS = 2**20  # fp32 softmax block of 4 MiB: stays in a CPU's cache through its six passes
_VOCAB_SLICE = 4096  # rows of dW computed at once, so that the temporary stays small


class Softmax:
    """Loss and gradient of R rows at a time in two fp32 buffers [R, V]; fp32 logits are their own first buffer."""

    def __init__(self, logits_CV: torch.Tensor, wide: torch.dtype) -> None:
        num_rows, vocab = logits_CV.shape
        self.rows = max(1, min(num_rows, _BLOCK_ELEMENTS // vocab))
        self.z_RV = None if logits_CV.dtype == wide else logits_CV.new_empty((self.rows, vocab), dtype=wide)
        self.p_RV = logits_CV.new_empty((self.rows, vocab), dtype=wide)

    def __call__(
        self, logits_CV: torch.Tensor, labels_C: torch.Tensor, losses_C: torch.Tensor,
        scale: float, softcap: float | None, want_grad: bool,
    ) -> None:  # fmt: skip
        """As `cross_entropy_in_place`: dz = p, at the true class expm1(log p), dlogits = dz (1 - (z / softcap)^2)."""
        for start in range(0, logits_CV.shape[0], self.rows):
            z_RV, labels_R = logits_CV[start : start + self.rows], labels_C[start : start + self.rows]
            num = z_RV.shape[0]
            p_RV = self.p_RV[:num]
            z32_RV = z_RV if self.z_RV is None else self.z_RV[:num].copy_(z_RV)
            if softcap is not None:
                z32_RV.div_(softcap).tanh_().mul_(softcap)
            torch.log_softmax(z32_RV, -1, out=p_RV)
            keep_R1 = (labels_R != IGNORE_INDEX).unsqueeze(1)
            index_R1 = labels_R.unsqueeze(1).where(keep_R1, 0)
            log_p_R1 = p_RV.gather(1, index_R1)
            # where, not a product: an ignored row may have log p = -inf
            losses_C[start : start + num] = torch.where(keep_R1, -log_p_R1, 0.0).squeeze(1)
            if want_grad:
                p_RV.exp_().scatter_(1, index_R1, log_p_R1.expm1())
                if softcap is not None:
                    p_RV.mul_(z32_RV.div_(softcap).square_().neg_().add_(1.0))
                p_RV.mul_(keep_R1.to(p_RV.dtype) * scale)
                z_RV.copy_(p_RV)  # a multiplication that also casts is several times slower on a CPU


class SlicedProduct:
    """out += left @ right, a slice [S, D] of `out` at a time, in reused buffers of both dtypes."""

    def __init__(self) -> None:
        self.narrow_SD = self.wide_SD = None

    def __call__(self, out_VD: torch.Tensor, left_VC: torch.Tensor, right_CD: torch.Tensor, *, first: bool) -> None:
        """`first` overwrites."""
        if out_VD.dtype != right_CD.dtype and self.narrow_SD is None:
            shape = (min(_VOCAB_SLICE, out_VD.shape[0]), out_VD.shape[1])
            self.narrow_SD, self.wide_SD = right_CD.new_empty(shape), out_VD.new_empty(shape)
        for start in range(0, out_VD.shape[0], _VOCAB_SLICE):
            target_SD, left_SC = out_VD[start : start + _VOCAB_SLICE], left_VC[start : start + _VOCAB_SLICE]
            if self.narrow_SD is None or self.wide_SD is None:
                torch.addmm(target_SD, left_SC, right_CD, beta=0.0 if first else 1.0, out=target_SD)
                continue
            product_SD = torch.mm(left_SC, right_CD, out=self.narrow_SD[: target_SD.shape[0]])
            if first:
                target_SD.copy_(product_SD)
            else:  # adding a tensor of another dtype is several times slower
                target_SD.add_(self.wide_SD[: target_SD.shape[0]].copy_(product_SD))
