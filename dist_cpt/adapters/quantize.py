"""NF4: the linear layers of a frozen base in 4 bits. The one door of bitsandbytes for weights.

A layer [out, in] becomes codes uint8 [out * in / 2, 1], one 8-bit scale per 64 elements and one fp32 scale per
256 of those: 4.127 bits per element instead of 16. The head, the embeddings, norms and biases stay bf16. Engines
move and cut the codes like any frozen parameter; the scales lie beside them, whole on every rank.
Source: Dettmers et al., QLoRA: Efficient Finetuning of Quantized LLMs, section 3.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from dist_cpt_kernels import NestedScales, Nf4Scales, dequantize_nf4
from dist_cpt_kernels.dispatch import available
from torch import nn

from dist_cpt.adapters.lora import import_peft
from dist_cpt.errors import ConfigError, MissingExtraError

BLOCKSIZE = 64  # elements that share a scale; fixed by transformers for weights it quantises while loading
# What a resume must find again, beside the hash of the weights that were quantised.
IDENTITY = {"weights": "nf4", "weights_quantisation": {"blocksize": BLOCKSIZE, "double_quant": True}}


def load_nf4(folder: Path, hf_config: Any | None, device: torch.device) -> Any:
    """A transformers causal LM on `device` with every linear layer but the head in NF4, the rest in bf16.

    transformers quantises one tensor after the other while it reads: the 16-bit base never exists as a whole.

    Raises:
        MissingExtraError: bitsandbytes is not installed.
        ConfigError: the model has no linear layer to quantise.
    """
    require_bitsandbytes()
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    # Storage other than uint8 or the compute dtype would be cast, and so corrupted, by engines that cast weights.
    how = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_quant_storage=torch.uint8,
    )
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        config=hf_config,
        dtype=torch.bfloat16,
        quantization_config=how,
        device_map={"": device},
        use_safetensors=True,
        trust_remote_code=False,
    )
    layers: list[Any] = [module for module in model.modules() if _state(module) is not None]
    if not layers or _state(model.get_output_embeddings()) is not None:
        raise ConfigError(
            f"model type {model.config.model_type}: no linear layer beside the head for model.weights: nf4",
            remedy="use model.weights: bf16",
        )
    for layer in layers:
        found = (layer.weight.dtype, layer.quant_state.blocksize, layer.quant_state.nested)
        assert found == (torch.uint8, BLOCKSIZE, True)
        layer.forward = partial(_forward, layer)
    return model


def require_bitsandbytes() -> None:
    """Import bitsandbytes.

    Raises:
        MissingExtraError: it is not installed.
    """
    import_peft()  # first, for it knows how to bring in bitsandbytes without lines on every rank
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        raise MissingExtraError("model.weights: nf4", "qlora") from None


def quantisation_state(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of all that turns codes back into weights; none of it is a parameter or a buffer.

    `<layer>.weight.absmax` uint8 [blocks], `.nested_absmax` [blocks / 256], `.offset` [1] and the two tables of
    code values [16] and [256], fp32. The very tensors that are used, not copies.
    """
    for name, layer in module.named_modules():
        state = _state(layer)
        if state is None:
            continue
        yield f"{name}.weight.absmax", state.absmax
        yield f"{name}.weight.offset", state.offset.view(1)
        yield f"{name}.weight.quant_map", state.code
        yield f"{name}.weight.nested_absmax", state.state2.absmax
        yield f"{name}.weight.nested_quant_map", state.state2.code


def nf4_scales(layer: Any) -> Nf4Scales:
    """What turns the codes of a quantised layer into its weight [out, in], in bf16; views, not copies."""
    state = layer.quant_state
    nested = NestedScales(state.state2.code, state.state2.absmax, state.offset, state.state2.blocksize)
    return Nf4Scales(state.absmax, tuple(state.shape), nested, BLOCKSIZE)


def weight_elements(parameter: torch.Tensor) -> int:
    """Elements of the matrix that a parameter stands for, be it packed or not; before an engine cuts it."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else state.shape.numel()


def _state(module: Any) -> Any:
    return getattr(module, "quant_state", None)


class _Product(torch.autograd.Function):
    """x W^T + b with W unpacked for this one product, in forward and again in backward.

    bitsandbytes' own layer keeps a view of the gathered codes from forward to backward, so that ZeRO-3 could not
    free them; and on a CPU with bf16 instructions it repacks codes and scales in place at the first evaluation.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: Any) -> torch.Tensor:
        ctx.layer = layer
        return F.linear(x, _unpacked(layer, x.dtype), layer.bias)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        (grad,) = grads
        return grad @ _unpacked(ctx.layer, grad.dtype), None


def _forward(layer: Any, x: torch.Tensor) -> torch.Tensor:
    return _Product.apply(x, layer)


def _unpacked(layer: Any, dtype: torch.dtype) -> torch.Tensor:
    """The weight [out, in]. The codes are looked up now: an engine may have gathered them a moment ago."""
    state, codes = layer.quant_state, layer.weight.data
    if available(codes):  # one kernel instead of three, the same bits
        scales = nf4_scales(layer)
        weight = dequantize_nf4(codes, scales.absmax, scales.shape, scales.dtype, nested=scales.nested)
        return weight.to(dtype)
    from bitsandbytes.functional import dequantize_blockwise

    elements = state.shape.numel()
    absmax = dequantize_blockwise(state.absmax, state.state2) + state.offset
    # As one row: for rows of 16 n elements, but not 64 n, the CPU kernel of bitsandbytes 0.50 would take the scales
    # of other blocks. A row of an odd number of elements ends in the spare half of its last byte.
    row = (1, elements + elements % 2)
    flat = torch.ops.bitsandbytes.dequantize_4bit(codes, absmax, BLOCKSIZE, "nf4", row, torch.bfloat16)
    return flat[0, :elements].view(state.shape).to(dtype)
