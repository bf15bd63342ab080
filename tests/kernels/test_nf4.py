"""NF4 codes decode to bitsandbytes' own numbers, bit for bit."""

from __future__ import annotations

import pytest
import torch
from bitsandbytes import functional
from dist_cpt_kernels import NestedScales, dequantize_nf4, dispatch, reference

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def _quantized(shape, nested=True, block=64):
    generator = torch.Generator().manual_seed(len(shape) + shape[0])
    weight = torch.randn(shape, generator=generator) * torch.rand(
        shape[0], *[1] * (len(shape) - 1), generator=generator
    )
    packed, state = functional.quantize_4bit(
        weight, blocksize=block, compress_statistics=nested, quant_type="nf4", quant_storage=torch.uint8
    )
    scales = None
    if nested:
        scales = NestedScales(state.state2.code, state.state2.absmax, state.offset, state.state2.blocksize)
    return packed, state, scales


@pytest.mark.parametrize("interpreted", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nested", [True, False])
# the last has 258 scales, so a second absmax2; one has a tail of 27 elements, one an odd number of them
@pytest.mark.parametrize("shape", [(1, 64), (123, 64), (507,), (1, 2459), (3, 86, 64)])
def test_bits_are_those_of_bitsandbytes(monkeypatch, shape, nested, dtype, interpreted):
    monkeypatch.setattr(dispatch, "interpret_cpu_tensors", interpreted)
    packed, state, scales = _quantized(shape, nested)
    state.dtype = dtype
    expected = functional.dequantize_4bit(packed, state)
    found = dequantize_nf4(packed, state.absmax, shape, dtype, nested=scales)
    assert found.dtype == dtype
    assert found.shape == shape
    assert torch.equal(found, expected.reshape(shape))


def test_every_code_and_every_scale():
    """All 256 bytes and all 256 scale codes, not only those that a normal weight happens to have."""
    packed = torch.arange(256, dtype=torch.uint8).repeat(32)
    _, state, scales = _quantized((256, 64))
    absmax = torch.arange(256, dtype=torch.uint8)
    found = dequantize_nf4(packed, absmax, (256, 64), torch.bfloat16, nested=scales)
    assert torch.equal(found, reference.dequantize_nf4(packed, absmax, (256, 64), torch.bfloat16, nested=scales))
    state.absmax, state.dtype = absmax, torch.bfloat16
    assert torch.equal(found, functional.dequantize_4bit(packed[:, None], state))


@pytest.mark.parametrize("interpreted", [True, False])
def test_empty_and_a_view_that_is_not_aligned(monkeypatch, interpreted):
    monkeypatch.setattr(dispatch, "interpret_cpu_tensors", interpreted)
    nothing = torch.empty(0, dtype=torch.uint8)
    assert dequantize_nf4(nothing, torch.empty(0), (0, 64), torch.bfloat16).shape == (0, 64)
    packed, state, scales = _quantized((123, 64))
    view = torch.cat((packed[:3], packed))[3:]
    found, expected = (
        dequantize_nf4(p, state.absmax, (123, 64), torch.bfloat16, nested=scales) for p in (view, packed)
    )
    assert torch.equal(found, expected)
    with pytest.raises(ValueError, match="packed: 3936 contiguous uint8 expected"):
        dequantize_nf4(packed.repeat_interleave(2, 0)[::2], state.absmax, (123, 64), torch.bfloat16, nested=scales)


@pytest.mark.parametrize("block", [32, 128, 4096])
def test_other_block_sizes(block):
    packed, state, _ = _quantized((5, 4096), nested=False, block=block)
    state.dtype = torch.float32
    found = dequantize_nf4(packed, state.absmax, (5, 4096), torch.float32, block=block)
    assert torch.equal(found, functional.dequantize_4bit(packed, state))


def test_out_is_written():
    packed, state, scales = _quantized((4, 64))
    out = torch.empty(4, 64, dtype=torch.bfloat16)
    assert dequantize_nf4(packed, state.absmax, (4, 64), torch.bfloat16, nested=scales, out=out) is out
    assert torch.equal(out, dequantize_nf4(packed, state.absmax, (4, 64), torch.bfloat16, nested=scales))
    assert dequantize_nf4(packed[:0], torch.empty(0), (0, 64), torch.bfloat16).shape == (0, 64)


def test_wrong_arguments_are_named():
    packed, state, scales = _quantized((4, 64))
    good = {"packed": packed, "absmax": state.absmax, "shape": (4, 64), "dtype": torch.bfloat16, "nested": scales}
    for match, wrong in (
        ("packed: 128", {"packed": packed[:-1]}),
        ("absmax: 4", {"absmax": state.absmax[:-1]}),
        ("absmax: 4 torch.float32", {"nested": None}),
        ("dtype bf16", {"dtype": torch.float64}),
        ("block: a power of two", {"block": 48}),
        ("nested: a map of 256", {"nested": scales._replace(absmax=scales.absmax.repeat(2))}),
        ("out: contiguous", {"out": torch.empty(4, 64)}),
    ):
        with pytest.raises(ValueError, match=match):
            dequantize_nf4(**{**good, **wrong})
