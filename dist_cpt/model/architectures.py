"""The requirements on a causal LM, and where its backbone, layers, embeddings and head are.

`TESTED` architectures are covered by the packing, loss and adapter tests. Others load if they have the same parts and
nothing that the loss or the packing would compute incorrectly.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from dist_cpt.adapters.language_model import decoder_of
from dist_cpt.errors import ConfigError, DistCptError, printable
from dist_cpt.plan.families import FAMILIES
from dist_cpt.plan.model_check import NEUTRAL
from dist_cpt.plan.shapes import unpackable_layers


@dataclass(frozen=True)
class Fusable:
    """What the fused modules must know about a model type's layers; `prefix` starts its class names."""

    prefix: str
    casting: Literal["llama", "gemma"] = "llama"  # of RMSNorm: rounded before the weight, or after (1 + weight)
    window: Literal["none", "layer", "config"] = "none"  # where attention reads its sliding window
    softcap: bool = False  # of attention scores


FUSABLE = {
    "llama": Fusable("Llama"),
    "mistral": Fusable("Mistral", window="config"),
    "qwen2": Fusable("Qwen2", window="layer"),
    "qwen3": Fusable("Qwen3", window="layer"),
    "phi3": Fusable("Phi3", window="config"),
    "gemma2": Fusable("Gemma2", casting="gemma", window="layer", softcap=True),
    "gemma3_text": Fusable("Gemma3", casting="gemma", window="layer"),
}
_MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoe", "gpt_oss")
TESTED = (*FUSABLE, "gpt2", *_MIXTURES, "deepseek_v2", "deepseek_v3", "glm4_moe")
_FACTORS, _DIVISORS = ("logit_scale", "lm_head_multiplier"), ("logits_scaling", "logits_mup_width_multiplier")
_MULTIPLY_BY_DIVISOR = ("hyperclovax",)  # model types
TRY_ANOTHER = f"use another architecture; tested: {', '.join(TESTED)}"


@dataclass(frozen=True)
class Parts:
    """The parts of a causal LM; `max_positions` is set where positions are a learned table."""

    decoder: nn.Module
    layers: list[nn.Module]
    embeddings: nn.Embedding
    head: nn.Linear
    max_positions: int | None


@contextmanager
def one_line(
    doing: str, remedy: str = "dist-cpt model-check --build tries a model without its weights"
) -> Iterator[None]:
    """Turn what transformers or a model's own code raises into one line; `doing` says what was attempted.

    Raises:
        ConfigError: an exception that is not of this package.
    """
    try:
        yield
    except (DistCptError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        text = " ".join(str(error).split())
        text = text if len(text) <= 200 else f"{text[:197]}..."
        raise ConfigError(printable(f"{doing}: {type(error).__name__}: {text}"), remedy=remedy) from error


def check_config(hf_config: Any) -> None:
    """Refuse a config whose loss or attention is not implemented here.

    Raises:
        ConfigError: capped logits, auxiliary losses, or layers that attend across documents.
    """
    if hf_config.is_encoder_decoder:
        raise ConfigError(
            f"model type {hf_config.model_type}: it has an encoder and does not continue the text that it reads",
            remedy=f"use a decoder-only model; tested: {', '.join(TESTED)}",
        )
    hf_config = hf_config.get_text_config()
    kind = hf_config.model_type
    for key, why in NEUTRAL.items():
        if (value := getattr(hf_config, key, None)) is not None:
            raise ConfigError(
                f"model type {kind}: {key} = {value!r} {why}",
                remedy=f"use a model without it; tested: {', '.join(TESTED)}",
            )
    others = unpackable_layers(kind, getattr(hf_config, "layer_types", None))
    if others:
        raise ConfigError(
            f"model type {kind}: layers of type {', '.join(others)} cannot separate packed documents",
            remedy=f"use a model whose layers are known; tested: {', '.join(TESTED)}",
        )


def logit_scale(hf_config: Any) -> float:
    """The factor between the head's product and the logits.

    Source: the forward functions of Cohere, Granite, MiniCPM3, HyperCLOVAX, Falcon-H1 and Inkling in transformers 5.23.
    """
    factor, divisor = (
        math.prod(float(getattr(hf_config, key, None) or 1.0) for key in keys) for keys in (_FACTORS, _DIVISORS)
    )
    return factor * divisor if hf_config.model_type in _MULTIPLY_BY_DIVISOR else factor / divisor


def parts_of(model: Any) -> Parts:
    """Find the parts of a transformers causal LM.

    Raises:
        ConfigError: a part is missing or not supported by packing or the loss.
    """
    hf_config = model.config.get_text_config()
    kind = hf_config.model_type
    if not getattr(model, "_supports_attention_backend", False) and kind not in FAMILIES:
        raise ConfigError(
            f"model type {kind} has its own attention code, which cannot separate packed documents",
            remedy=TRY_ANOTHER,
        )
    decoder, embeddings, head = decoder_of(model), model.get_input_embeddings(), model.get_output_embeddings()
    layers = [
        list(child)
        for child in decoder.children()
        if isinstance(child, nn.ModuleList) and len(child) == hf_config.num_hidden_layers
    ]
    if decoder is model or len(layers) != 1 or not isinstance(embeddings, nn.Embedding):
        raise ConfigError(f"model type {kind}: no single stack of decoder layers under a token embedding found")
    if not isinstance(head, nn.Linear) or head.bias is not None:
        raise ConfigError(
            f"model type {kind}: the output head must be a linear layer without bias, not {type(head).__name__}"
            f"{'' if head is None else ' with bias'}"
        )
    if head.in_features != embeddings.embedding_dim and head.in_features != hf_config.hidden_size:
        raise ConfigError(f"model type {kind}: the head reads {head.in_features} features, not the hidden size")
    return Parts(decoder, layers[0], embeddings, head, _max_positions(decoder))


def _max_positions(decoder: nn.Module) -> int | None:
    tables = [
        m for name, m in decoder.named_children() if isinstance(m, nn.Embedding) and name in ("wpe", "embed_positions")
    ]
    return tables[0].num_embeddings if tables else None
