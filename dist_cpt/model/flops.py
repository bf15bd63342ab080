"""Model FLOPs of training, without recomputation, so that MFU is comparable between runs.

Source: 2 FLOPs per weight and token in the forward pass, 2 for the input's gradient, 2 for the weight's
(none if frozen): 4 N_frozen + 6 N_trainable. Causal attention over a document of s tokens is two
products over s^2 / 2 pairs: 2 s^2 d_attention per layer forward, three times that with the backward pass.
An embedding lookup is free; a tied table counts once, as the head.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from dist_cpt.adapters.quantize import weight_elements


@dataclass(frozen=True)
class ModelFlops:
    """Numbers of frozen and trainable matrix weights, and the attention width summed over layers."""

    frozen: int
    trainable: int
    attention_width: int  # num_layers * num_heads * head_dim

    def step(self, document_lengths: Iterable[int]) -> int:
        """FLOPs of forward and backward over packed documents of these lengths in tokens."""
        tokens = squares = 0
        for length in document_lengths:
            tokens += length
            squares += length * length
        return (4 * self.frozen + 6 * self.trainable) * tokens + 6 * self.attention_width * squares

    def per_token(self, document_lengths: Iterable[int]) -> float:
        """FLOPs per token of forward and backward over documents of these lengths in tokens."""
        lengths = list(document_lengths)
        return self.step(lengths) / sum(lengths)


def model_flops(module: nn.Module, hf_config: Any, *, embeddings: nn.Embedding, tied: bool) -> ModelFlops:
    """Count the elements of all 2-D parameters except lookup tables; a tied table counts as the head."""
    lookups = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    if tied:
        lookups.discard(id(embeddings.weight))
    counts = {True: 0, False: 0}
    for parameter in module.parameters():
        if parameter.ndim == 2 and id(parameter) not in lookups:
            counts[parameter.requires_grad] += weight_elements(parameter)
    head_dim = getattr(hf_config, "head_dim", None) or hf_config.hidden_size // hf_config.num_attention_heads
    width = hf_config.num_hidden_layers * hf_config.num_attention_heads * head_dim
    return ModelFlops(counts[False], counts[True], width)
