"""NF4 decoded on a GPU: bitsandbytes' own numbers, bit for bit."""

from __future__ import annotations

import pytest
import torch
from bitsandbytes import functional
from dist_cpt_kernels import dequantize_nf4, dispatch

from tests.kernel_inputs import nf4 as case

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 64), (507, 64), (4096, 4096), (1024, 14336)])
def test_bits_are_those_of_bitsandbytes(shape, dtype):
    assert not dispatch.INTERPRETED, "run with TRITON_INTERPRET=0"
    packed, state, scales = case.quantized(shape, device="cuda")
    state.dtype = dtype
    actual = dequantize_nf4(packed, state.absmax, shape, dtype, nested=scales)
    assert torch.equal(actual, functional.dequantize_4bit(packed, state))
