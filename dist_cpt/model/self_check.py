"""Checks of the loaded model on this device before training: packing, attention, kernels and fused modules.

Kernels are compiled for this GPU by the installed Triton, and neither may have been tested before. So a model runs
two short documents with its fast paths and without, and the results must agree.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from dist_cpt_kernels.self_test import ALLOWED as ALLOWED_FOR_KERNELS
from dist_cpt_kernels.self_test import self_test, self_test_fp8
from torch import nn

from dist_cpt.adapters.fp8_linear import Fp8Linear
from dist_cpt.adapters.quantize import quantisation_state
from dist_cpt.errors import ConfigError, config_error_on_failure
from dist_cpt.model.architectures import TESTED
from dist_cpt.model.attention import install
from dist_cpt.model.base_weights import UnreadBase
from dist_cpt.model.loss import CausalLMForLoss
from dist_cpt.runtime.liveness import made_progress

SIZES = (19, 13)  # tokens of the two documents
# Relative to a vector's length. Two bf16 runs that round differently are a few hundredths apart after 80 layers; a
# wrong sign, position or missing term changes either by its own size.
ALLOWED = {torch.float32: 1e-3, torch.bfloat16: 0.1}


@torch.no_grad()
def self_check_packing(model: Any) -> None:
    """Check an untested architecture: backbone, packed attention and head must give the model's own logits.

    Compares the last logits of the second of two packed documents with those of the unmodified model for that
    document alone. The packed attention stays installed.

    Raises:
        ConfigError: they differ, so the model computes something that this package does not.
    """
    model.eval()
    device = next(model.parameters()).device
    ids, position_ids, cu_seqlens = _two_documents(model.config.get_text_config().vocab_size, device)
    head = model.get_output_embeddings()
    softcap, logit_scale = head.softcap, head.logit_scale
    head.softcap, head.logit_scale = None, 1.0  # the model itself scales and caps the logits of its head
    expected = model(input_ids=ids[:, SIZES[0] :], use_cache=False).logits[0, -1].float()
    head.softcap, head.logit_scale = softcap, logit_scale
    install(model, "documents")
    actual = CausalLMForLoss(model, "documents")(ids, position_ids, cu_seqlens, max(SIZES))[0]
    error = float((actual - expected).abs().max() / expected.abs().max())
    model.train()
    # Summation order matters a little; anything missing from attention or head changes logits far more.
    allowed = 1e-4 if next(model.parameters()).dtype == torch.float32 else 3e-2
    if not error <= allowed:
        raise ConfigError(
            f"model type {model.config.model_type}: packed training would not compute this model: the relative error "
            f"of a document's logits is {error:.1e}, allowed {allowed:.0e}",
            remedy=f"use another architecture; tested: {', '.join(TESTED)}",
        )


def self_check_fusion(module: CausalLMForLoss, swapped: Sequence[tuple[nn.Module, type]], dtype: torch.dtype) -> None:
    """Compare each kernel with its specification, then the fused model with its original modules, in `dtype`.

    The model is compared by its hidden states and their gradient at the embeddings. `swapped` are modules with their
    original classes. Parameters and classes are restored.

    Raises:
        ConfigError: a kernel does not run on this device, or results differ by more than rounding.
    """
    what = f"model.kernels: the fused modules fail on {_device_name(module)}"
    with config_error_on_failure(what, "use model.kernels: reference"):
        wrong = _wrong_kernels(module, dtype)
        made_progress()
        with _frozen(module, dtype):
            fused = _hidden_and_gradient(module)
            with _original_classes(swapped):
                original = _hidden_and_gradient(module)
    if wrong:
        raise ConfigError(
            f"model.kernels: on {_device_name(module)} the relative error of kernels exceeds "
            f"{ALLOWED_FOR_KERNELS[dtype]:.0e}: {', '.join(f'{name} {error:.1e}' for name, error in wrong.items())}",
            remedy="use model.kernels: reference",
        )
    _compare(
        fused,
        original,
        dtype,
        f"model.kernels: on {_device_name(module)} the fused modules differ from the original ones",
        "use model.kernels: reference",
    )


def self_check_attention(module: CausalLMForLoss, dtype: torch.dtype) -> None:
    """Compare the attention in use with the dense mask, as `self_check_fusion` compares modules.

    Raises:
        ConfigError: it does not run on this device, or results differ by more than rounding.
    """
    attention = module.attention
    what = f"model.attention: {attention} fails on {_device_name(module)}"
    try:
        with config_error_on_failure(what, "use model.attention: mask"), _frozen(module, dtype):
            actual = _hidden_and_gradient(module)
            install(module.hf_model, "mask")
            module.attention = "mask"
            expected = _hidden_and_gradient(module)
    finally:
        install(module.hf_model, attention)
        module.attention = attention
    _compare(
        actual,
        expected,
        dtype,
        f"model.attention: on {_device_name(module)} {attention} differs from the dense mask",
        "use model.attention: mask",
    )


def self_check_fp8(module: CausalLMForLoss) -> None:
    """Compare the products of an fp8 base with their specification.

    Raises:
        ConfigError: they do not run on this device, or codes, scales or results differ.
    """
    if not any(isinstance(layer, Fp8Linear) for layer in module.modules()):
        return
    what, remedy = f"model.weights: fp8: e4m3 products fail on {_device_name(module)}", "use model.weights: bf16 or nf4"
    with config_error_on_failure(what, remedy):
        error = self_test_fp8(next(module.parameters()).device)
    if not error <= ALLOWED_FOR_KERNELS[torch.bfloat16]:
        raise ConfigError(f"{what}: relative error {error:.1e} against the specification", remedy=remedy)


def kinds_of_layers(hf_config: Any) -> list[int]:
    """The number of the first decoder layer of each kind."""
    kinds = getattr(hf_config, "layer_types", None) or ["the only one"]
    return [kinds.index(kind) for kind in dict.fromkeys(kinds)]


@contextmanager
def one_layer(module: CausalLMForLoss, layers: Sequence[nn.Module], number: int, unread: UnreadBase) -> Iterator[None]:
    """`module` as a model of one decoder layer, with what computes its hidden states read; placeholders afterwards."""
    decoder: Any = module.hf_model.get_decoder()
    stack = next(
        n for n, child in decoder.named_children() if isinstance(child, nn.ModuleList) and child[0] is layers[0]
    )
    every_layer, config = getattr(decoder, stack), decoder.config
    parameters = {path: module.get_parameter(path) for path in unread.sources}
    kinds = getattr(config, "layer_types", None)
    before = {"num_hidden_layers": config.num_hidden_layers} | ({"layer_types": kinds} if kinds else {})
    setattr(decoder, stack, nn.ModuleList([layers[number]]))
    read: dict[str, torch.Tensor] = {}
    try:
        config.num_hidden_layers = 1
        if kinds:
            config.layer_types = [kinds[number]]
        computing = {id(parameter) for parameter in decoder.parameters()}
        scales = dict(quantisation_state(module))
        for paths in unread.units:
            if id(parameters[paths[0]]) not in computing:
                continue
            for path, value in unread.read(paths).items():
                if path in scales:
                    scales[path].copy_(value)
                else:
                    parameter = parameters[path]
                    read[path], parameter.data = parameter.data, value.to(parameter.device)
        yield
    finally:
        setattr(decoder, stack, every_layer)
        for key, value in before.items():
            setattr(config, key, value)
        for path, empty in read.items():
            parameters[path].data = empty


def _compare(
    actual: Sequence[torch.Tensor], expected: Sequence[torch.Tensor], dtype: torch.dtype, what: str, remedy: str
) -> None:
    errors = [
        float(torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(b).clamp_min(1e-30))
        for a, b in zip(actual, expected, strict=True)
    ]
    if not max(errors) <= ALLOWED[dtype]:
        raise ConfigError(
            f"{what}: relative error {errors[0]:.1e} of the hidden states and {errors[1]:.1e} of their gradient, "
            f"allowed {ALLOWED[dtype]:.0e}",
            remedy=remedy,
        )


def _wrong_kernels(module: CausalLMForLoss, dtype: torch.dtype) -> dict[str, float]:
    config = module.hf_model.config.get_text_config()
    heads = config.num_attention_heads
    errors = self_test(
        next(module.parameters()).device,
        dtype,
        dim=config.hidden_size,
        ffn=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
    )
    return {name: error for name, error in errors.items() if not error <= ALLOWED_FOR_KERNELS[dtype]}


def _device_name(module: nn.Module) -> str:
    device = next(module.parameters()).device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def _two_documents(vocab: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(input_ids, position_ids [1, L], cu_seqlens int32) of two packed documents of random tokens."""
    ids = torch.randint(0, vocab, (1, sum(SIZES)), generator=torch.Generator().manual_seed(0)).to(device)
    position_ids = torch.cat([torch.arange(size) for size in SIZES])[None].to(device)
    return ids, position_ids, torch.tensor([0, SIZES[0], sum(SIZES)], dtype=torch.int32, device=device)


def _hidden_and_gradient(module: CausalLMForLoss) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 hidden states [L, D] and the gradient of their weighted sum with respect to the embeddings."""
    model = module.hf_model
    ids, position_ids, cu_seqlens = _two_documents(
        model.config.get_text_config().vocab_size, next(model.parameters()).device
    )
    inputs: list[torch.Tensor] = []

    def make_leaf(_module: nn.Module, _args: Any, output: torch.Tensor) -> torch.Tensor:
        inputs.append(output.detach().requires_grad_())
        return inputs[0]

    hook = model.get_input_embeddings().register_forward_hook(make_leaf)
    try:
        hidden = module.hidden(ids, position_ids, cu_seqlens, max(SIZES))[0]
    finally:
        hook.remove()
    weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1)).to(hidden)
    (grad,) = torch.autograd.grad((hidden * weights).sum(), inputs)
    made_progress()  # the first run compiles kernels
    return hidden.detach().float(), grad.float()


@contextmanager
def _original_classes(swapped: Sequence[tuple[nn.Module, type]]) -> Iterator[None]:
    classes = [type(part) for part, _ in swapped]
    try:
        for part, original in swapped:
            part.__class__ = original
        yield
    finally:
        for (part, _), fused_class in zip(swapped, classes, strict=True):
            part.__class__ = fused_class


@contextmanager
def _frozen(module: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """All parameters frozen, in evaluation mode and in the compute dtype of engines."""
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    masters = [parameter.data for parameter in trainable]
    module.eval()
    for parameter in trainable:
        parameter.requires_grad_(False)
        parameter.data = parameter.data.to(dtype)
    try:
        yield
    finally:
        module.train()
        for parameter, data in zip(trainable, masters, strict=True):
            parameter.data = data
            parameter.requires_grad_(True)
