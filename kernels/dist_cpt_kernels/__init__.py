"""Fused operations of training, each beside its plain specification in `dist_cpt_kernels.reference`."""

from __future__ import annotations

from dist_cpt_kernels.linear_cross_entropy import linear_cross_entropy

__all__ = ["linear_cross_entropy"]
