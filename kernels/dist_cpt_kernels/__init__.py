"""Fused operations of training, each beside its plain specification in `dist_cpt_kernels.reference`."""

from __future__ import annotations

from dist_cpt_kernels.adamw import adamw_, clip, sum_of_squares
from dist_cpt_kernels.cross_entropy import cross_entropy
from dist_cpt_kernels.embedding import RowGradient, embedding, embedding_gradient, embedding_gradient_rows
from dist_cpt_kernels.linear_cross_entropy import linear_cross_entropy
from dist_cpt_kernels.nf4 import NestedScales, dequantize_nf4

__all__ = [
    "NestedScales",
    "RowGradient",
    "adamw_",
    "clip",
    "cross_entropy",
    "dequantize_nf4",
    "embedding",
    "embedding_gradient",
    "embedding_gradient_rows",
    "linear_cross_entropy",
    "sum_of_squares",
]
