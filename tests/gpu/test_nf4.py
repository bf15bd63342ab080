"""NF4 decoded on a GPU: bitsandbytes' own numbers, bit for bit."""

from __future__ import annotations

import pytest
import torch
from bitsandbytes import functional
from dist_cpt_kernels import NestedScales, dequantize_nf4, dispatch

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 64), (507, 64), (4096, 4096), (1024, 14336)])
def test_bits_are_those_of_bitsandbytes(shape, dtype):
    assert not dispatch.INTERPRETED, "run with TRITON_INTERPRET=0"
    weight = torch.randn(shape, device="cuda", dtype=torch.bfloat16) * 0.02
    packed, state = functional.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    state.dtype = dtype
    scales = NestedScales(state.state2.code, state.state2.absmax, state.offset, state.state2.blocksize)
    found = dequantize_nf4(packed, state.absmax, shape, dtype, nested=scales)
    assert torch.equal(found, functional.dequantize_4bit(packed, state))
