"""Fused training operations, each with a specification in plain torch in `dist_cpt_kernels.reference`."""

from __future__ import annotations

from dist_cpt_kernels.adamw import adamw_, bias_corrections, clip, sum_of_squares
from dist_cpt_kernels.adamw_8bit import adamw_8bit_
from dist_cpt_kernels.embedding import embedding, embedding_gradient
from dist_cpt_kernels.fp8 import fp8_input_gradient, fp8_linear, quantize_rows, scaled_product
from dist_cpt_kernels.gated import gated, gated_gradients
from dist_cpt_kernels.linear_cross_entropy import linear_cross_entropy
from dist_cpt_kernels.lora_linear import lora_linear, lora_mlp
from dist_cpt_kernels.nf4 import dequantize_nf4
from dist_cpt_kernels.projection import NestedScales, Nf4Scales, Projection, QuantisedRows, RowScales
from dist_cpt_kernels.rms_norm import add_rms_norm, rms_norm
from dist_cpt_kernels.rope import rope, rope_tables

__all__ = [
    "NestedScales",
    "Nf4Scales",
    "Projection",
    "QuantisedRows",
    "RowScales",
    "adamw_",
    "adamw_8bit_",
    "add_rms_norm",
    "bias_corrections",
    "clip",
    "dequantize_nf4",
    "embedding",
    "embedding_gradient",
    "fp8_input_gradient",
    "fp8_linear",
    "gated",
    "gated_gradients",
    "linear_cross_entropy",
    "lora_linear",
    "lora_mlp",
    "quantize_rows",
    "rms_norm",
    "rope",
    "rope_tables",
    "scaled_product",
    "sum_of_squares",
]
