"""NF4 codes decode to bitsandbytes' own numbers, bit for bit."""

from __future__ import annotations

import pytest
import torch
from bitsandbytes import functional
from dist_cpt_kernels import dequantize_nf4, dispatch, reference

from tests.kernel_inputs import nf4 as case

DTYPES = [torch.bfloat16, torch.float32]


@pytest.mark.parametrize("interpreted", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nested", [True, False])
# the last has 258 scales, so a second absmax2; one has a tail of 27 elements, one an odd number of them
@pytest.mark.parametrize("shape", [(1, 64), (123, 64), (507,), (1, 2459), (3, 86, 64)])
def test_bits_are_those_of_bitsandbytes(monkeypatch, shape, nested, dtype, interpreted):
    monkeypatch.setattr(dispatch, "interpret_cpu_tensors", interpreted)
    packed, state, scales = case.quantized(shape, nested)
    state.dtype = dtype
    expected = functional.dequantize_4bit(packed, state)
    actual = dequantize_nf4(packed, state.absmax, shape, dtype, nested=scales)
    assert actual.dtype == dtype
    assert actual.shape == shape
    assert torch.equal(actual, expected.reshape(shape))


def test_every_code_and_every_scale():
    """All 256 bytes and all 256 scale codes, not only those that a normal weight happens to have."""
    packed = torch.arange(256, dtype=torch.uint8).repeat(32)
    _, state, scales = case.quantized((256, 64))
    absmax = torch.arange(256, dtype=torch.uint8)
    actual = dequantize_nf4(packed, absmax, (256, 64), torch.bfloat16, nested=scales)
    assert torch.equal(actual, reference.dequantize_nf4(packed, absmax, (256, 64), torch.bfloat16, nested=scales))
    state.absmax, state.dtype = absmax, torch.bfloat16
    assert torch.equal(actual, functional.dequantize_4bit(packed[:, None], state))


@pytest.mark.parametrize("interpreted", [True, False])
def test_empty_and_a_view_that_is_not_aligned(monkeypatch, interpreted):
    monkeypatch.setattr(dispatch, "interpret_cpu_tensors", interpreted)
    nothing = torch.empty(0, dtype=torch.uint8)
    assert dequantize_nf4(nothing, torch.empty(0), (0, 64), torch.bfloat16).shape == (0, 64)
    packed, state, scales = case.quantized((123, 64))
    view = torch.cat((packed[:3], packed))[3:]
    actual, expected = (
        dequantize_nf4(p, state.absmax, (123, 64), torch.bfloat16, nested=scales) for p in (view, packed)
    )
    assert torch.equal(actual, expected)
    with pytest.raises(ValueError, match="packed: expected 3936 contiguous uint8"):
        dequantize_nf4(packed.repeat_interleave(2, 0)[::2], state.absmax, (123, 64), torch.bfloat16, nested=scales)


def test_wrong_arguments_are_named():
    packed, state, scales = case.quantized((4, 64))
    good = {"packed": packed, "absmax": state.absmax, "shape": (4, 64), "dtype": torch.bfloat16, "nested": scales}
    for match, wrong in (
        ("packed: expected 128", {"packed": packed[:-1]}),
        ("absmax: expected 4", {"absmax": state.absmax[:-1]}),
        ("absmax: expected 4 torch.float32", {"nested": None}),
        ("dtype: ", {"dtype": torch.float64}),
        ("nested: ", {"nested": scales._replace(absmax=scales.absmax.repeat(2))}),
    ):
        with pytest.raises(ValueError, match=match):
            dequantize_nf4(**{**good, **wrong})
