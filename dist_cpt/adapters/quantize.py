"""NF4, int8 and fp8: the linear layers and experts of a frozen base in 4 or 8 bits.

The formats: `nf4_linear`, `int8_linear`, `fp8_linear`; experts: `quantised_experts`. The head, the embeddings, norms
and biases stay bf16. Engines move and shard the codes like any frozen parameter; the scales are replicated.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from dist_cpt_kernels import Nf4Scales, RowScales
from torch import nn

from dist_cpt.adapters import fp8_linear, int8_linear, nf4_linear
from dist_cpt.adapters.fp8_linear import name_plain_layers
from dist_cpt.adapters.language_model import auto_class
from dist_cpt.adapters.lora import import_peft
from dist_cpt.adapters.quantised_experts import dequantise_experts, stacks_of
from dist_cpt.errors import ConfigError
from dist_cpt.run_folder.names import MODEL_CONFIG
from dist_cpt.runtime.log import LOGGER
from dist_cpt.storage import read_bytes

_DEQUANTISED = {"mxfp4": "Mxfp4Config", "fp8": "FineGrainedFP8Config"}  # quant_method -> transformers' settings


def load_quantised(
    folder: Path, hf_config: Any | None, device: torch.device, weights: str, *, own_code: bool = False
) -> Any:
    """A transformers causal LM on `device` with every linear layer but the head in `weights`, the rest in bf16.

    transformers quantises tensor by tensor while it reads: the 16-bit base is never in memory as a whole. Weights
    that are quantised already are read code by code.

    Raises:
        MissingExtraError: bitsandbytes is not installed.
        ConfigError: no linear layer to quantise, or an unsupported quantisation in the folder.
    """
    from transformers import AutoConfig

    hf_config = hf_config or AutoConfig.from_pretrained(folder, trust_remote_code=own_code)
    stored = stored_weights(folder)
    if _method(folder) in _DEQUANTISED:
        raise ConfigError(
            f"model.path: {folder} has {_method(folder)} weights: they would have to be quantised again to {weights}",
            remedy="use model.weights: bf16, or give the 16-bit model",
        )
    loaded: Any = auto_class(hf_config).from_pretrained(
        folder,
        config=hf_config,
        dtype=torch.bfloat16,
        **loading_options(weights, device, stored),
        use_safetensors=True,
        trust_remote_code=own_code,
        output_loading_info=True,
    )
    model = require_complete(folder, *loaded)
    for name, layer, form in _quantised_layers(model):
        form.settle(folder, name, layer)
    _require_quantised(folder, model, weights)
    return model


def loading_options(weights: str, device: torch.device, stored: str | None) -> dict[str, Any]:
    """Arguments of from_pretrained for a base in `weights`; `stored` so already, or not."""
    if weights not in QUANTISED:
        return {}
    require_format(weights, device)
    chosen = {} if stored is not None else {"quantization_config": FORMATS[weights].settings()}  # None overrides
    return chosen | {"device_map": {"": device}}


def set_placeholders(folder: Path, model: Any, weights: str, device: torch.device) -> None:
    """Give the quantised layers of a model whose weights are not read yet placeholders for their codes, and scales and
    tables on `device` that are to be overwritten."""
    for _, layer, form in _quantised_layers(model):
        form.set_placeholder(layer, device)
    for _, _, _, stack in stacks_of(model):
        stack.scales.update(stack.empty(device))
        del stack.scales["codes"]
    _require_quantised(folder, model, weights)


def take_scales(folder: Path, model: Any) -> list[tuple[str, torch.Tensor]]:
    """`quantisation_state` of the layers that have been read into a model on the meta device; it forgets them."""
    read = [entry for entry in _quantised_layers(model) if not entry[1].weight.is_meta]
    for name, layer, form in read:
        form.settle(folder, name, layer)
    scales = list(quantisation_state(model))
    for _, layer, form in read:
        setattr(layer, form.attribute, None)
    for _, _, _, stack in stacks_of(model):
        stack.scales.clear()
    return scales


def load_plain(folder: Path, hf_config: Any | None, dtype: torch.dtype, *, own_code: bool = False) -> Any:
    """A transformers model of `folder` with its language model, in `dtype`; MXFP4 and block-wise fp8 are dequantised.

    Raises:
        ConfigError: no causal language model, weights are missing, or an unsupported quantisation.
    """
    from transformers import AutoConfig

    hf_config = hf_config or AutoConfig.from_pretrained(folder, trust_remote_code=own_code)
    method, options = _method(folder), {}
    if method in _DEQUANTISED:
        import transformers

        LOGGER.info("model.path: %s weights are dequantised to %s", method, str(dtype).removeprefix("torch."))
        options = {"quantization_config": getattr(transformers, _DEQUANTISED[method])(dequantize=True)}
    loaded: Any = auto_class(hf_config).from_pretrained(
        folder,
        config=hf_config,
        dtype=dtype,
        use_safetensors=True,
        trust_remote_code=own_code,
        output_loading_info=True,
        **options,
    )
    model = require_complete(folder, *loaded)
    if options:
        _forget_quantisation(model)
        model._weight_conversions = None  # saved under the names of the 16-bit model
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
    return model


def require_complete(folder: Path, model: Any, loading_info: Mapping[str, Any]) -> Any:
    """`model`, unless the folder lacks some of its weights, which transformers only warns about and draws at random.

    Raises:
        ConfigError: names the first missing weight.
    """
    if missing := sorted(loading_info["missing_keys"]):
        more = f" and {len(missing) - 1} more of its weights" if len(missing) > 1 else ""
        raise ConfigError(f"model.path: {folder} lacks {missing[0]}{more}", remedy="give the whole language model")
    return model


def stored_weights(folder: Path) -> str | None:
    """nf4 or int8 for weights that bitsandbytes quantised, None for plain ones and those dequantised while reading.

    Raises:
        ConfigError: another quantisation.
    """
    quantization, method = quantisation_of(folder), _method(folder)
    if quantization is None or method in _DEQUANTISED:
        return None
    if method == "bitsandbytes" and quantization.get("load_in_8bit"):
        return "int8"
    if quantization.get("load_in_4bit"):
        method = f"{method} {quantization.get('bnb_4bit_quant_type', 'fp4')}"
    if method == "bitsandbytes nf4":
        storage = quantization.get("bnb_4bit_quant_storage", "uint8")
        if storage == "uint8":
            return "nf4"
        method = f"{method} stored as {storage}"  # engines that cast weights would corrupt codes of a float dtype
    raise ConfigError(
        f"model.path: {folder} has quantised weights of an unsupported kind: {method}",
        remedy="give a bitsandbytes nf4 (stored as uint8) or int8 folder, or the unquantised model",
    )


def quantisation_of(folder: Path) -> dict[str, Any] | None:
    """The quantisation that a model folder's config.json records."""
    config = json.loads(read_bytes(folder / MODEL_CONFIG))
    return config.get("quantization_config") or (config.get("text_config") or {}).get("quantization_config")


def _method(folder: Path) -> str | None:
    quantization = quantisation_of(folder)
    return None if quantization is None else str(quantization.get("quant_method"))


def is_dequantised(folder: Path) -> bool:
    """Whether the folder's weights are quantised in a way that is undone while they are read."""
    return _method(folder) in _DEQUANTISED


def _forget_quantisation(model: Any) -> None:
    """Make a dequantised model a plain one, also where it is saved."""
    if getattr(model, "hf_quantizer", None) is not None:
        model.hf_quantizer.remove_quantization_config(model)
    for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
        vars(config).pop("quantization_config", None)
    # transformers would revert the conversions it read the codes with when the model is saved.
    model._weight_conversions = [
        conversion
        for conversion in getattr(model, "_weight_conversions", None) or []
        if not any(
            ".integrations." in type(operation).__module__ for operation in getattr(conversion, "operations", ())
        )
    ]


def identity_of(model: Any, weights: str, stored: bool) -> dict[str, Any]:
    """How the weights are quantised: what a resume must match besides the sha256 of the files."""
    method = next(form.identity(layer) for layer in model.modules() if (form := format_of(layer)) is not None)
    if experts := sorted({name for _, _, name, _ in stacks_of(model)}):
        method |= {"experts": experts}
    return {"weights": weights, "weights_quantisation": method | ({"stored": True} if stored else {})}


def is_quantised(module: Any) -> bool:
    """Whether `module` is a linear layer in one of FORMATS."""
    return format_of(module) is not None


def require_format(weights: str, device: torch.device) -> None:
    """Check that `device` can train over a base in `weights`.

    Raises:
        MissingExtraError: bitsandbytes is needed and not installed.
        ConfigError: the device cannot multiply such matrices.
    """
    import_peft()  # first: it silences bitsandbytes' warnings
    FORMATS[weights].require(device)


def quantisation_state(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of the scales and tables that dequantise a model; none of them is a parameter or a buffer.

    NF4: `<layer>.weight.absmax` uint8 [blocks], `.nested_absmax` [blocks / 256], `.offset` [1] and two tables of code
    values [16] and [256], fp32; without double quantisation `.absmax` fp32 and one table. int8: `.row_absmax` fp32
    [out]; fp8: `.row_scales` fp32 [out]. Of experts the same, one for each, after the parameter's name. Not copies.
    """
    for name, layer in module.named_modules():
        if (form := format_of(layer)) is not None:
            for key, tensor in form.state(layer):
                yield f"{name}.weight.{key}", tensor
    for path, _, _, stack in stacks_of(module):
        for key, tensor in stack.scales.items():
            yield f"{path}.{key}", tensor


def kernel_scales(layer: Any) -> Nf4Scales | RowScales | None:
    """With what the fused functions multiply by a layer's codes, views and not copies; None if they do not."""
    form = format_of(layer)
    return None if form is None else form.kernel_scales(layer)


def read_weight(layer: Any) -> torch.Tensor:
    """A linear layer's weight as fp32 [out, in], stored plain, transposed, or in one of FORMATS."""
    if (form := format_of(layer)) is not None:
        return form.read(layer)
    weight = layer.weight.data.float()
    return weight if isinstance(layer, nn.Linear) else weight.T


def write_weight(layer: Any, weight: torch.Tensor) -> None:
    """Set a linear layer's weight to fp32 [out, in], rounded or quantised as the layer stores it; in place."""
    if (form := format_of(layer)) is not None:
        form.write(layer, weight)
    else:
        layer.weight.data.copy_(weight if isinstance(layer, nn.Linear) else weight.T)


def dequantise(model: Any) -> Any:
    """`model` with plain fp32 layers and experts of its architecture in place of the quantised ones."""
    from transformers.pytorch_utils import Conv1D

    dequantise_experts(model)
    for name, layer in [(n, m) for n, m in model.named_modules() if is_quantised(m)]:
        with torch.device("meta"):
            plain: Any = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
            if layer.source_cls is Conv1D:
                plain = Conv1D(layer.out_features, layer.in_features)
        weight = read_weight(layer)
        plain.weight = nn.Parameter(weight if isinstance(plain, nn.Linear) else weight.T.contiguous())
        plain.bias = layer.bias
        model.set_submodule(name, plain)
    _forget_quantisation(model)
    model.is_loaded_in_4bit = model.is_loaded_in_8bit = False
    return model.float()


class Format(Protocol):
    """How linear layers are stored in 4 or 8 bits."""

    attribute: str  # of a layer: what dequantises it, None until it is read
    layer_class: str

    def require(self, device: torch.device) -> None: ...
    def settings(self) -> Any: ...
    def settle(self, folder: Path, name: str, layer: Any) -> None: ...
    def set_placeholder(self, layer: Any, device: torch.device) -> None: ...
    def state(self, layer: Any) -> Iterator[tuple[str, torch.Tensor]]: ...
    def identity(self, layer: Any) -> dict[str, Any]: ...
    def kernel_scales(self, layer: Any) -> Nf4Scales | RowScales | None: ...
    def read(self, layer: Any) -> torch.Tensor: ...
    def write(self, layer: Any, weight: torch.Tensor) -> None: ...


def format_of(layer: Any) -> Format | None:
    """The format of a layer that has been read, or has placeholders; None for a plain module."""
    return next((form for form in FORMATS.values() if getattr(layer, form.attribute, None) is not None), None)


def _quantised_layers(model: Any) -> Iterator[tuple[str, Any, Format]]:
    """(name, layer, its format) of the layers that transformers has made to be quantised, read or not."""
    formats = {form.layer_class: form for form in FORMATS.values()}
    for name, layer in model.named_modules():
        if (form := formats.get(type(layer).__name__)) is not None:
            yield name, layer, form


def _require_quantised(folder: Path, model: Any, weights: str) -> None:
    if not any(is_quantised(layer) for _, layer, _ in _quantised_layers(model)):
        raise ConfigError(
            f"model type {model.config.model_type}: no linear layer beside the head for model.weights: {weights}",
            remedy="use model.weights: bf16",
        )
    if is_quantised(model.get_output_embeddings()):
        raise ConfigError(f"{folder} has a quantised output head", remedy="give a copy whose head is in 16 bits")
    if weights == "fp8":
        name_plain_layers(model)


FORMATS: dict[str, Format] = {
    "nf4": nf4_linear.FORM,
    "int8": int8_linear.FORM,
    "fp8": fp8_linear.FORM,
}  # by `model.weights`
QUANTISED = tuple(FORMATS)
