"""NF4 codes and scales for the tests of dequantisation."""

from __future__ import annotations

import torch
from bitsandbytes import functional
from dist_cpt_kernels import NestedScales


def quantized(shape, nested=True, device="cpu"):
    """(codes, bitsandbytes' state, nested scales or None) of a random weight whose rows differ in size."""
    generator = torch.Generator().manual_seed(len(shape) + shape[0])
    rows = torch.rand(shape[0], *[1] * (len(shape) - 1), generator=generator)
    weight = (torch.randn(shape, generator=generator) * rows).to(device)
    packed, state = functional.quantize_4bit(
        weight, blocksize=64, compress_statistics=nested, quant_type="nf4", quant_storage=torch.uint8
    )
    scales = None
    if nested:
        scales = NestedScales(state.state2.code, state.state2.absmax, state.offset, state.state2.blocksize)
    return packed, state, scales
