"""NF4: codes uint8 [out * in / 2, 1], one 8-bit scale per 64 elements and one fp32 scale per 256 of those: 4.127 bits
per element. A module that uses bitsandbytes.

Source: Dettmers et al., QLoRA: Efficient Finetuning of Quantized LLMs, section 3.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from dist_cpt_kernels import NestedScales, Nf4Scales, dequantize_nf4
from dist_cpt_kernels.dispatch import available

from dist_cpt.adapters.placeholders import placeholder
from dist_cpt.adapters.quantised_experts import Spec, with_experts
from dist_cpt.errors import ConfigError, MissingExtraError

BLOCKSIZE = 64  # elements that share a scale; fixed by transformers for weights it quantises while loading
NESTED_BLOCKSIZE = 256  # of those scales share one of the second kind


class Nf4Format:
    """How `quantize` treats these layers and experts."""

    attribute, layer_class = "quant_state", "Linear4bit"
    tables = ("quant_map", "nested_quant_map")

    def require(self, device: torch.device) -> None:
        require_bitsandbytes("nf4")

    def settings(self) -> Any:
        # Engines that cast floating-point weights would corrupt codes stored in a float dtype.
        return _settings_class()(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
            bnb_4bit_quant_storage=torch.uint8,
        )

    def settle(self, folder: Path, name: str, layer: Any) -> None:
        state = layer.quant_state
        stored = (state.quant_type, state.blocksize, str(layer.weight.dtype))
        if stored != ("nf4", BLOCKSIZE, "torch.uint8"):
            raise ConfigError(
                f"{folder}: {name} is {stored[0]} in blocks of {stored[1]}, stored as {stored[2]}",
                remedy=f"only nf4 in blocks of {BLOCKSIZE}, stored as uint8, is supported",
            )
        layer.forward = partial(nf4_linear, layer)

    def set_placeholder(self, layer: Any, device: torch.device) -> None:
        _set_nf4_placeholder(layer, torch.Size((layer.out_features, layer.in_features)), device)
        layer.forward = partial(nf4_linear, layer)

    def state(self, layer: Any) -> Iterator[tuple[str, torch.Tensor]]:
        state = layer.quant_state
        yield "absmax", state.absmax
        yield "quant_map", state.code
        if state.nested:
            yield "offset", state.offset.view(1)
            yield "nested_absmax", state.state2.absmax
            yield "nested_quant_map", state.state2.code

    def identity(self, layer: Any) -> dict[str, Any]:
        return {"blocksize": layer.quant_state.blocksize, "double_quant": layer.quant_state.nested}

    def kernel_scales(self, layer: Any) -> Nf4Scales:
        state = layer.quant_state
        nested = None
        if state.nested:
            nested = NestedScales(state.state2.code, state.state2.absmax, state.offset, state.state2.blocksize)
        return Nf4Scales(state.absmax, tuple(state.shape), nested)

    def read(self, layer: Any) -> torch.Tensor:
        return _dequantised(layer, torch.float32)

    def write(self, layer: Any, weight: torch.Tensor) -> None:
        from bitsandbytes.functional import quantize_4bit

        state = layer.quant_state
        codes, new = quantize_4bit(weight, blocksize=BLOCKSIZE, compress_statistics=state.nested, quant_type="nf4")
        new.dtype = state.dtype
        layer.weight.data.copy_(codes)
        layer.weight.quant_state = layer.quant_state = new

    def fits(self, outputs: int, inputs: int) -> bool:
        return outputs * inputs % BLOCKSIZE == 0

    def expert_spec(self, outputs: int, inputs: int) -> Spec:
        blocks = outputs * inputs // BLOCKSIZE
        return {
            "codes": ((outputs * inputs // 2, 1), torch.uint8),
            "absmax": ((blocks,), torch.uint8),
            "nested_absmax": ((-(-blocks // NESTED_BLOCKSIZE),), torch.float32),
            "offset": ((), torch.float32),
            "quant_map": ((16,), torch.float32),
            "nested_quant_map": ((256,), torch.float32),
        }

    def quantise_expert(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        from bitsandbytes.functional import quantize_4bit

        codes, state = quantize_4bit(weight, blocksize=BLOCKSIZE, compress_statistics=True, quant_type="nf4")
        assert state.state2 is not None
        outer = {"offset": state.offset, "nested_absmax": state.state2.absmax, "nested_quant_map": state.state2.code}
        return {"codes": codes, "absmax": state.absmax, "quant_map": state.code} | outer

    def dequantise_experts(
        self, codes: torch.Tensor, scales: Mapping[str, torch.Tensor], outputs: int, dtype: torch.dtype
    ) -> torch.Tensor:
        absmax, nested = scales["absmax"], scales["nested_absmax"].repeat_interleave(NESTED_BLOCKSIZE, 1)
        scale = scales["nested_quant_map"][absmax.int()] * nested[:, : absmax.shape[1]] + scales["offset"][:, None]
        shape = (len(codes), outputs, -1)
        if available(codes):
            return dequantize_nf4(codes, scale, (2 * codes.numel(),), torch.bfloat16).view(shape).to(dtype)
        return _decoded(codes.view(-1, 1), scale.flatten(), 2 * codes.numel()).view(shape).to(dtype)

    def row_factors(self, scales: Mapping[str, torch.Tensor]) -> None:
        return None


FORM = Nf4Format()


@cache
def _settings_class() -> Any:
    """For `from_pretrained`: bitsandbytes' settings under the name of a quantiser that knows experts."""
    from transformers import BitsAndBytesConfig
    from transformers.quantizers.auto import register_quantizer
    from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

    method: Any = "dist_cpt_nf4"

    class Settings(BitsAndBytesConfig):
        def __init__(self, **settings: Any) -> None:
            super().__init__(**settings)
            self.quant_method = method

    register_quantizer(method)(with_experts(Bnb4BitHfQuantizer, FORM, "nf4"))
    return Settings


def require_bitsandbytes(weights: str) -> None:
    """Raises: MissingExtraError: it is not installed."""
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        raise MissingExtraError(f"model.weights: {weights}", "qlora") from None


def _set_nf4_placeholder(layer: Any, shape: torch.Size, device: torch.device) -> None:
    from bitsandbytes.functional import QuantState
    from bitsandbytes.nn import Params4bit

    codes: Any = Params4bit
    blocks, nested = -(-shape.numel() // BLOCKSIZE), layer.weight.compress_statistics
    outer = None
    if nested:
        empty = torch.zeros(-(-blocks // NESTED_BLOCKSIZE), device=device)
        outer = QuantState(empty, blocksize=NESTED_BLOCKSIZE, code=torch.zeros(256, device=device), dtype=torch.float32)
    layer.quant_state = QuantState(
        torch.zeros(blocks, dtype=torch.uint8 if nested else torch.float32, device=device),
        shape,
        torch.zeros(16, device=device),
        BLOCKSIZE,
        "nf4",
        torch.bfloat16,
        torch.zeros((), device=device) if nested else None,
        outer,
    )
    layer.weight = codes(
        placeholder((-(-shape.numel() // 2), 1), torch.uint8),
        quant_state=layer.quant_state,
        blocksize=BLOCKSIZE,
        compress_statistics=nested,
        quant_type="nf4",
        module=layer,
        bnb_quantized=True,
    )


class _Nf4Product(torch.autograd.Function):
    """x W^T + b; W is dequantised in forward and again in backward.

    bitsandbytes' own layer keeps a view of the gathered codes from forward to backward, so ZeRO-3 could not free
    them; and on a CPU with bf16 instructions it repacks codes and scales in place at the first evaluation.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: Any) -> torch.Tensor:
        ctx.layer = layer
        return F.linear(x, _dequantised(layer, x.dtype), layer.bias)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        (grad,) = grads
        return grad @ _dequantised(ctx.layer, grad.dtype), None


def nf4_linear(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """x [..., in] -> [..., out] through a layer with NF4 codes and their `quant_state`."""
    return _Nf4Product.apply(x, layer)


def _dequantised(layer: Any, dtype: torch.dtype) -> torch.Tensor:
    """The weight [out, in] of the codes that are in the layer now: an engine may just have gathered them."""
    state, codes = layer.quant_state, layer.weight.data
    if available(codes):  # one kernel instead of three, bit-identical
        scales = FORM.kernel_scales(layer)
        weight = dequantize_nf4(codes, scales.absmax, scales.shape, torch.bfloat16, nested=scales.nested)
        return weight.to(dtype)
    from bitsandbytes.functional import dequantize_blockwise

    elements = state.shape.numel()
    absmax = dequantize_blockwise(state.absmax, state.state2) + state.offset if state.nested else state.absmax
    return _decoded(codes, absmax, elements).view(state.shape).to(dtype)


def _decoded(codes: torch.Tensor, absmax: torch.Tensor, elements: int) -> torch.Tensor:
    """bf16 [elements]; `absmax` fp32, one for each block."""
    # As one row: for row lengths that 16 divides but 64 does not, the CPU kernel of bitsandbytes 0.50 reads the scales
    # of other blocks. An odd number of elements leaves half of the last byte unused.
    row = (1, elements + elements % 2)
    flat = torch.ops.bitsandbytes.dequantize_4bit(codes, absmax, BLOCKSIZE, "nf4", row, torch.bfloat16)
    return flat[0, :elements]
