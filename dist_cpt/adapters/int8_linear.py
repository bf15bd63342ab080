"""int8: codes int8 [out, in], and one fp32 scale per row. A module that uses bitsandbytes.

Source: Dettmers et al., LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale, section 2.1.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from dist_cpt.adapters.nf4_linear import require_bitsandbytes
from dist_cpt.adapters.placeholders import placeholder
from dist_cpt.adapters.quantised_experts import Spec, with_experts


class Int8Format:
    """How `quantize` treats these layers and experts."""

    attribute, layer_class = "row_absmax", "Linear8bitLt"
    tables = ()

    def require(self, device: torch.device) -> None:
        require_bitsandbytes("int8")

    def settings(self) -> Any:
        return _settings_class()(load_in_8bit=True)

    def settle(self, folder: Path, name: str, layer: Any) -> None:
        layer.row_absmax = layer.weight.SCB.float()
        layer.weight = nn.Parameter(layer.weight.data, requires_grad=False)
        layer.forward = partial(int8_linear, layer)

    def set_placeholder(self, layer: Any, device: torch.device) -> None:
        shape = (layer.out_features, layer.in_features)
        layer.weight = nn.Parameter(placeholder(shape, torch.int8), requires_grad=False)
        layer.row_absmax = torch.zeros(layer.out_features, device=device)
        layer.forward = partial(int8_linear, layer)

    def state(self, layer: Any) -> Iterator[tuple[str, torch.Tensor]]:
        yield "row_absmax", layer.row_absmax

    def identity(self, layer: Any) -> dict[str, Any]:
        return {"row_wise": True}

    def kernel_scales(self, layer: Any) -> None:
        return None

    def read(self, layer: Any) -> torch.Tensor:
        return layer.weight.data.float() * (layer.row_absmax / 127.0)[:, None]

    def write(self, layer: Any, weight: torch.Tensor) -> None:
        rows = self.quantise_expert(weight)
        layer.weight.data.copy_(rows["codes"])
        layer.row_absmax.copy_(rows["row_absmax"])

    def fits(self, outputs: int, inputs: int) -> bool:
        return True

    def expert_spec(self, outputs: int, inputs: int) -> Spec:
        return {"codes": ((outputs, inputs), torch.int8), "row_absmax": ((outputs,), torch.float32)}

    def quantise_expert(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        absmax = weight.float().abs().amax(1)
        codes = weight.float() * (127.0 / absmax.clamp_min(torch.finfo(torch.float32).tiny))[:, None]
        return {"codes": codes.round_().clamp_(-127, 127).to(torch.int8), "row_absmax": absmax}

    def dequantise_experts(
        self, codes: torch.Tensor, scales: Mapping[str, torch.Tensor], outputs: int, dtype: torch.dtype
    ) -> torch.Tensor:
        return codes.to(dtype)

    def row_factors(self, scales: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return scales["row_absmax"] / 127.0


FORM = Int8Format()


@cache
def _settings_class() -> Any:
    """For `from_pretrained`: bitsandbytes' settings under the name of a quantiser that knows experts."""
    from transformers import BitsAndBytesConfig
    from transformers.quantizers.auto import register_quantizer
    from transformers.quantizers.quantizer_bnb_8bit import Bnb8BitHfQuantizer

    method: Any = "dist_cpt_int8"

    class Settings(BitsAndBytesConfig):
        def __init__(self, **settings: Any) -> None:
            super().__init__(**settings)
            self.quant_method = method

    register_quantizer(method)(with_experts(Bnb8BitHfQuantizer, FORM, "int8"))
    return Settings


class _RowScaledProduct(torch.autograd.Function):
    """x W^T + b for int8 rows, each with a scale. The product is over the codes, exact in bf16, and scaled in fp32, so
    no weight is rounded to bf16.

    bitsandbytes' own layer would also round x to 8 bits, and hides its codes from engines.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: Any) -> torch.Tensor:
        ctx.layer = layer
        y = F.linear(x, layer.weight.data.to(x.dtype)) * (layer.row_absmax / 127.0)
        return (y if layer.bias is None else y + layer.bias).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        (grad,) = grads
        scaled = (grad * (ctx.layer.row_absmax / 127.0)).to(grad.dtype)
        return scaled @ ctx.layer.weight.data.to(grad.dtype), None


def int8_linear(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """x [..., in] -> [..., out] through a layer with int8 codes and their `row_absmax`."""
    return _RowScaledProduct.apply(x, layer)
