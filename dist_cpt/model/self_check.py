"""The fused modules against the originals, and the attention against a dense mask, on this device, before training.

Kernels are compiled for the GPU that is there, by the Triton that is there: neither may be one that was tested. So
a model whose modules were fused first answers for two short documents with them and without.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from dist_cpt_kernels.self_test import ALLOWED as ALLOWED_OF_A_KERNEL
from dist_cpt_kernels.self_test import self_test
from torch import nn

from dist_cpt.errors import ConfigError
from dist_cpt.model.attention import install
from dist_cpt.model.loss import CausalLMForLoss

SIZES = (19, 13)  # of the documents
# Of a vector's length. Two bf16 runs that round in other places differ by a few hundredths after 80 layers; a wrong
# sign, a wrong position or a lost term moves either by its own size.
ALLOWED = {torch.float32: 1e-3, torch.bfloat16: 0.1}


def prove_fusion(module: CausalLMForLoss, swapped: Sequence[tuple[nn.Module, type]], dtype: torch.dtype) -> None:
    """Hold each kernel to its specification, then the whole fused model to the original modules, in `dtype`.

    Compared are hidden states and their gradient at the embeddings. `swapped` are modules and the classes they had.
    Every parameter and class is afterwards as before.

    Raises:
        ConfigError: a kernel does not run on this device, or they differ by more than rounding does.
    """
    try:
        wrong = _wrong_kernels(module, dtype)
        errors = _errors(module, swapped, dtype)
    except Exception as error:  # Triton, its compiler and the driver each raise their own
        raise ConfigError(
            f"model.kernels: the fused modules fail on {_device_name(module)}: {type(error).__name__}: {error}",
            remedy="use model.kernels: reference",
        ) from error
    if wrong:
        raise ConfigError(
            f"model.kernels: on {_device_name(module)} kernels are further from their specification than "
            f"{ALLOWED_OF_A_KERNEL[dtype]:.0e}: {', '.join(f'{name} {error:.1e}' for name, error in wrong.items())}",
            remedy="use model.kernels: reference",
        )
    if not max(errors) <= ALLOWED[dtype]:
        raise ConfigError(
            f"model.kernels: on {_device_name(module)} the fused modules differ from the original ones by "
            f"{errors[0]:.1e} in the hidden states and {errors[1]:.1e} in their gradient, allowed {ALLOWED[dtype]:.0e}",
            remedy="use model.kernels: reference",
        )


def prove_attention(module: CausalLMForLoss, dtype: torch.dtype) -> None:
    """Hold this device's way of attention to the dense mask, as `prove_fusion` holds modules to others.

    Raises:
        ConfigError: it does not run on this device, or they differ by more than rounding does.
    """
    chosen = module.attention
    try:
        with _one_dtype(module, dtype):
            found = _answer(module)
            install(module.hf_model, "mask")
            module.attention = "mask"
            expected = _answer(module)
    except Exception as error:  # each way's own compiler raises its own
        raise ConfigError(
            f"model.attention: {chosen} fails on {_device_name(module)}: {type(error).__name__}: {error}",
            remedy="use model.attention: mask",
        ) from error
    finally:
        install(module.hf_model, chosen)
        module.attention = chosen
    errors = [_relative(a, b) for a, b in zip(found, expected, strict=True)]
    if not max(errors) <= ALLOWED[dtype]:
        raise ConfigError(
            f"model.attention: on {_device_name(module)} {chosen} differs from the dense mask by {errors[0]:.1e} in "
            f"the hidden states and {errors[1]:.1e} in their gradient, allowed {ALLOWED[dtype]:.0e}",
            remedy="use model.attention: mask",
        )


def _wrong_kernels(module: CausalLMForLoss, dtype: torch.dtype) -> dict[str, float]:
    config = module.hf_model.config
    heads = config.num_attention_heads
    found = self_test(
        next(module.parameters()).device,
        dtype,
        dim=config.hidden_size,
        ffn=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
    )
    return {name: error for name, error in found.items() if not error <= ALLOWED_OF_A_KERNEL[dtype]}


def _device_name(module: nn.Module) -> str:
    device = next(module.parameters()).device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def _errors(
    module: CausalLMForLoss, swapped: Sequence[tuple[nn.Module, type]], dtype: torch.dtype
) -> tuple[float, float]:
    with _one_dtype(module, dtype):
        fused = _answer(module)
        classes = [type(part) for part, _ in swapped]
        try:
            for part, original in swapped:
                part.__class__ = original
            expected = _answer(module)
        finally:
            for (part, _), fused_class in zip(swapped, classes, strict=True):
                part.__class__ = fused_class
    first, second = (_relative(found, truth) for found, truth in zip(fused, expected, strict=True))
    return first, second


def _answer(module: CausalLMForLoss) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 hidden states [L, D] and the gradient of their weighted sum with respect to the embeddings."""
    model = module.hf_model
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (1, sum(SIZES)), generator=generator).to(device)
    positions = torch.cat([torch.arange(size) for size in SIZES])[None].to(device)
    borders = torch.tensor([0, SIZES[0], sum(SIZES)], dtype=torch.int32, device=device)
    inputs: list[torch.Tensor] = []

    def watch(_module: nn.Module, _args: Any, output: torch.Tensor) -> torch.Tensor:
        inputs.append(output.detach().requires_grad_())
        return inputs[0]

    hook = model.get_input_embeddings().register_forward_hook(watch)
    try:
        hidden = module.hidden(ids, positions, borders, max(SIZES))[0]
    finally:
        hook.remove()
    weights = torch.randn(hidden.shape, generator=generator).to(hidden)
    (grad,) = torch.autograd.grad((hidden * weights).sum(), inputs)
    return hidden.detach().float(), grad.float()


@contextmanager
def _one_dtype(module: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Everything frozen, in evaluation mode and in the dtype that engines compute in."""
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    kept = [parameter.data for parameter in trainable]
    module.eval()
    for parameter in trainable:
        parameter.requires_grad_(False)
        parameter.data = parameter.data.to(dtype)
    try:
        yield
    finally:
        module.train()
        for parameter, data in zip(trainable, kept, strict=True):
            parameter.data = data
            parameter.requires_grad_(True)


def _relative(found: torch.Tensor, truth: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(found - truth) / torch.linalg.vector_norm(truth).clamp_min(1e-30))
