"""fp8: the linear layers of a frozen base as e4m3 codes, uint8 [out, in], with an fp32 scale per row.

transformers quantises each matrix whole, as soon as it has read it in bf16. The product, and why one copy of the codes
serves forward and backward: `dist_cpt_kernels.fp8`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from dist_cpt_kernels import RowScales, fp8_linear, quantize_rows
from dist_cpt_kernels.fp8 import MULTIPLE, why_not
from torch import nn

from dist_cpt.adapters.placeholders import placeholder
from dist_cpt.adapters.quantised_experts import Spec, with_experts
from dist_cpt.errors import ConfigError
from dist_cpt.runtime.log import LOGGER


class Fp8Linear(nn.Linear):
    """A linear layer with codes and `row_scales` instead of a weight; neither a parameter nor a buffer, the scales are
    on every rank."""

    source_cls = nn.Linear
    row_scales: torch.Tensor | None = None

    @classmethod
    def in_place_of(cls, plain: nn.Linear) -> Fp8Linear:
        with torch.device("meta"):
            layer = cls(plain.in_features, plain.out_features, plain.bias is not None)
            codes = torch.empty(layer.weight.shape, dtype=torch.uint8)
        layer.weight = nn.Parameter(codes, requires_grad=False)
        return layer.requires_grad_(False)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        assert self.row_scales is not None
        return fp8_linear(input, self.weight, self.row_scales, self.bias)


class Fp8Format:
    """How `quantize` treats these layers."""

    attribute, layer_class = "row_scales", Fp8Linear.__name__
    tables = ()

    def require(self, device: torch.device) -> None:
        """Raises: ConfigError: the GPU has no e4m3 products."""
        if (reason := why_not(device)) is not None:
            name = torch.cuda.get_device_name(device)
            raise ConfigError(f"model.weights: fp8: {name} {reason}", remedy="use model.weights: bf16, nf4 or int8")

    def settings(self) -> Any:
        return _settings_class()()

    def settle(self, folder: Path, name: str, layer: Any) -> None:
        """Nothing: a layer that has been read has its scales."""

    def set_placeholder(self, layer: Any, device: torch.device) -> None:
        layer.weight = nn.Parameter(placeholder(layer.weight.shape, torch.uint8), requires_grad=False)
        layer.row_scales = torch.zeros(layer.out_features, device=device)

    def state(self, layer: Any) -> Iterator[tuple[str, torch.Tensor]]:
        yield "row_scales", layer.row_scales

    def identity(self, layer: Any) -> dict[str, Any]:
        return {"row_wise": True, "codes": "e4m3fn"}

    def kernel_scales(self, layer: Any) -> RowScales:
        return RowScales(layer.row_scales, (layer.out_features, layer.in_features))

    def read(self, layer: Any) -> torch.Tensor:
        return layer.weight.data.view(torch.float8_e4m3fn).float() * layer.row_scales[:, None]

    def write(self, layer: Any, weight: torch.Tensor) -> None:
        rows = quantize_rows(weight)
        layer.weight.data.copy_(rows.codes)
        layer.row_scales.copy_(rows.scales)

    def fits(self, outputs: int, inputs: int) -> bool:
        return inputs % MULTIPLE == 0 and outputs % MULTIPLE == 0

    def expert_spec(self, outputs: int, inputs: int) -> Spec:
        return {"codes": ((outputs, inputs), torch.uint8), "row_scales": ((outputs,), torch.float32)}

    def quantise_expert(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        rows = quantize_rows(weight)
        return {"codes": rows.codes, "row_scales": rows.scales}

    def dequantise_experts(
        self, codes: torch.Tensor, scales: Mapping[str, torch.Tensor], outputs: int, dtype: torch.dtype
    ) -> torch.Tensor:
        return codes.view(torch.float8_e4m3fn).to(dtype)

    def row_factors(self, scales: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return scales["row_scales"]


FORM = Fp8Format()


def name_plain_layers(model: Any) -> None:
    """Log the linear layers that stay in bf16 because e4m3 products do not take their sizes."""
    head = model.get_output_embeddings()
    left = {
        f"{name.rpartition('.')[2]} {layer.out_features} x {layer.in_features}"
        for name, layer in model.named_modules()
        if type(layer) is nn.Linear and layer is not head and not _fits(layer)
    }
    if left:
        kept = ", ".join(sorted(left))
        LOGGER.info("model.weights: fp8: in bf16, with sizes that %d does not divide: %s", MULTIPLE, kept)


def _fits(layer: nn.Linear) -> bool:
    return FORM.fits(layer.out_features, layer.in_features)


@cache
def _settings_class() -> Any:
    """For `from_pretrained`; what it does with them is registered with transformers."""
    from transformers.core_model_loading import ConversionOps
    from transformers.quantizers.auto import register_quantizer
    from transformers.quantizers.base import HfQuantizer
    from transformers.quantizers.quantizers_utils import should_convert_module
    from transformers.utils.quantization_config import QuantizationConfigMixin

    method: Any = "dist_cpt_fp8"
    operation: Any = ConversionOps  # whose subclasses override attributes as transformers' own do
    quantizer: Any = HfQuantizer

    class Settings(QuantizationConfigMixin):
        def __init__(self) -> None:
            self.quant_method = method

    class Quantise(operation):
        def convert(self, input_dict: Any, model: Any = None, **kwargs: Any) -> dict[str, Any]:
            converted = {}
            for name, value in input_dict.items():
                rows = quantize_rows(value[0] if isinstance(value, list) else value)
                layer = model.get_submodule(name.rpartition(".")[0])
                layer.row_scales, layer._is_hf_initialized = rows.scales, True
                converted[name] = nn.Parameter(rows.codes, requires_grad=False)
            return converted

    class Quantizer(quantizer):
        quantized_element_size = 1
        is_trainable = True

        def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
            module, _, name = param_name.rpartition(".")
            return name == "weight" and isinstance(model.get_submodule(module), Fp8Linear)

        def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
            plain = self.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
            for name, layer in list(model.named_modules()):
                if type(layer) is nn.Linear and _fits(layer) and should_convert_module(name, plain):
                    model.set_submodule(name, Fp8Linear.in_place_of(layer))
            return model

        def get_quantize_ops(self) -> Any:
            return Quantise()

        def is_serializable(self) -> bool:
            return False

    register_quantizer(method)(with_experts(Quantizer, FORM, "fp8"))
    return Settings
