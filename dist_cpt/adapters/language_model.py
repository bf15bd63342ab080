"""Where a language model is: a transformers model of its own, or the text model inside a multimodal one."""

from __future__ import annotations

from typing import Any

from torch import nn

from dist_cpt.errors import ConfigError, printable


def auto_class(hf_config: Any) -> Any:
    """The transformers class that loads all weights of a folder with this config, multimodal ones included.

    Raises:
        ConfigError: the model type has no language model that predicts the next token.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    if is_multimodal(hf_config) and type(hf_config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return AutoModelForImageTextToText  # its AutoModelForCausalLM may be the text model alone
    if type(hf_config) in MODEL_FOR_CAUSAL_LM_MAPPING or getattr(hf_config, "auto_map", None):
        return AutoModelForCausalLM
    raise ConfigError(
        printable(f"model type {hf_config.model_type} has no causal language model in transformers"),
        remedy="use a model that generates text from left to right",
    )


def is_multimodal(hf_config: Any) -> bool:
    """Whether the language model is a part of a larger one, with a config of its own."""
    return hf_config.get_text_config() is not hf_config


def decoder_of(model: Any) -> Any:
    """The backbone of the language model, which turns token ids into hidden states."""
    decoder = model.get_decoder()
    while (inner := getattr(decoder, "get_decoder", None)) is not None and inner() is not decoder:
        decoder = inner()
    return decoder


def recurrent_mixers(model: nn.Module) -> list[nn.Module]:
    """The modules that carry a state from token to token: each has a causal convolution, beside it perhaps a scan."""
    return [m for m in model.modules() if any(isinstance(child, nn.Conv1d) for child in m.children())]


def outside(model: Any) -> list[tuple[nn.Module, str]]:
    """(parent, name of its child) of the towers and projectors beside the language model of a multimodal one."""
    if not is_multimodal(model.config):
        return []
    decoder, head = decoder_of(model), model.get_output_embeddings()
    inside = {id(module) for part in (decoder, head) for module in part.modules()}
    found: list[tuple[nn.Module, str]] = []

    def visit(parent: nn.Module) -> bool:
        """Whether a part of the language model is in `parent`; lists its children without any."""
        apart = [name for name, child in parent.named_children() if id(child) not in inside and not visit(child)]
        within = len(apart) < len(list(parent.children()))
        found.extend((parent, name) for name in apart if within)
        return within

    visit(model)
    return found
