"""Mixins that run transformers' modules on the fused operations.

B batch, L sequence, T = B * L tokens, D model, F ffn, H heads, K kv heads, N head dim.

A module keeps its parameters, name and hooks; only its forward changes. A mixin reads parameters of its children
(the base and adapter matrices of its projections), so a sharding engine must gather all parameters of a module with
`gathers_at_once` before its forward and its backward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from dist_cpt_kernels import add_rms_norm, embedding, gated, rms_norm, rope
from dist_cpt_kernels.lora_linear import lora_linear, lora_mlp
from dist_cpt_kernels.projection import Projection
from torch import nn
from transformers import AttentionInterface

from dist_cpt.adapters.quantize import kernel_scales


@dataclass(frozen=True)
class Rotation:
    """The angles of one batch; not a pytree, so engines that cast floating-point arguments do not cast it."""

    cos_TR: torch.Tensor  # fp32, one row per token, contiguous
    sin_TR: torch.Tensor
    row_BL: torch.Tensor  # int64: the row of each token


class FusedRotary(nn.Module):
    """Angles in fp32; the original rounds them to the dtype of its input."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Rotation:
        original: Any = super()
        cos_BLN, sin_BLN = original.forward(x.new_empty(0, dtype=torch.float32), *args, **kwargs)
        half = cos_BLN.shape[-1] // 2  # the second half repeats the first
        cos_TR, sin_TR = (table[..., :half].reshape(-1, half).contiguous() for table in (cos_BLN, sin_BLN))
        rows = torch.arange(cos_BLN.shape[:-1].numel(), device=x.device)
        return Rotation(cos_TR, sin_TR, rows.view(cos_BLN.shape[:-1]))


class FusedNorm(nn.Module):
    """RMSNorm, alone or fused with the residual addition; `casting` is set when the class is swapped."""

    weight: nn.Parameter
    casting: Literal["llama", "gemma"]
    epsilon: float

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
        """The norm of `x`; with `residual`: (the norm of x + residual, x + residual)."""
        if residual is None:
            return rms_norm(x, self.weight, self.epsilon, casting=self.casting)
        return add_rms_norm(x, residual, self.weight, self.epsilon, casting=self.casting)


class FusedEmbedding(nn.Embedding):
    """An embedding whose gradient is summed in fp32 in a fixed order."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return embedding(input, self.weight, padding_idx=self.padding_idx)


class FusedAttention(nn.Module):
    """All projections of one input in one function, RoPE on queries and keys in one kernel."""

    config: Any
    layer_idx: int
    scaling: float
    head_dim: int
    attention_dropout: float
    q_proj: Any
    k_proj: Any
    v_proj: Any
    qkv_proj: Any  # Phi 3 has this instead of the three
    o_proj: Any
    q_norm: Any  # Qwen 3 and Gemma 3
    k_norm: Any
    fused_projections: frozenset[str]  # subset of qkv and o; the others are called as modules
    window: int | None
    softcap: float | None
    gathers_at_once: bool

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: Rotation,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        batch, length, _ = hidden_states.shape
        query, key, value = self._query_key_value(hidden_states, batch, length)  # [B, L, heads, N]
        if hasattr(self, "q_norm"):
            query, key = self.q_norm(query), self.k_norm(key)
        rotation = position_embeddings
        query, key = rope(query, key, rotation.cos_TR, rotation.sin_TR, rotation.row_BL)
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend: Callable[..., Any] = AttentionInterface()[self.config._attn_implementation]
        options = {} if self.softcap is None else {"softcap": self.softcap}
        out, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.window,
            **options,
            **kwargs,
        )
        (out,) = self._project("o", out.reshape(batch, length, -1), self.o_proj)
        return out, weights

    def _query_key_value(self, x: torch.Tensor, batch: int, length: int) -> tuple[torch.Tensor, ...]:
        if not hasattr(self, "qkv_proj"):
            outs = self._project("qkv", x, self.q_proj, self.k_proj, self.v_proj)
            return tuple(out.view(batch, length, -1, self.head_dim) for out in outs)
        (packed,) = self._project("qkv", x, self.qkv_proj)
        heads, kv_heads = self.config.num_attention_heads, self.config.num_key_value_heads
        return packed.view(batch, length, -1, self.head_dim).split([heads, kv_heads, kv_heads], dim=2)

    def _project(self, name: str, x: torch.Tensor, *modules: Any) -> tuple[torch.Tensor, ...]:
        if name not in self.fused_projections:
            return tuple(module(x) for module in modules)
        return lora_linear(x, *map(projection, modules), training=self.training)


class FusedMlp(nn.Module):
    """The gated MLP as one function that saves gate and up, not their product; with `recomputes` none of the three."""

    gate_proj: Any
    up_proj: Any
    gate_up_proj: Any  # Phi 3 has this instead of the two
    down_proj: Any
    activation: Any
    fused_projections: frozenset[str]  # mlp, or empty: then only the activation is fused
    gathers_at_once: bool
    recomputes = False
    output_unread = False  # while a checkpoint repeats the forward pass for what it saves

    @property
    def is_one_function(self) -> bool:
        return "mlp" in self.fused_projections and not hasattr(self, "gate_up_proj")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.is_one_function:
            maps = (projection(module) for module in (self.gate_proj, self.up_proj, self.down_proj))
            how = {"recompute": self.recomputes, "output_unread": self.output_unread}
            return lora_mlp(x, *maps, activation=self.activation, training=self.training, **how)
        fused = "mlp" in self.fused_projections
        if hasattr(self, "gate_up_proj"):
            packed = self._linear(self.gate_up_proj, x) if fused else self.gate_up_proj(x)
            gate, up = packed.chunk(2, dim=-1)
            product = gated(gate, up, self.activation)
        else:
            product = gated(self.gate_proj(x), self.up_proj(x), self.activation)
        return self._linear(self.down_proj, product, self.output_unread) if fused else self.down_proj(product)

    def _linear(self, module: Any, x: torch.Tensor, output_unread: bool = False) -> torch.Tensor:
        return lora_linear(x, projection(module), training=self.training, output_unread=output_unread)[0]


class FusedLayer(nn.Module):
    """A decoder layer that adds the attention output and normalises the sum in one kernel."""

    self_attn: Any
    mlp: Any
    input_layernorm: Any
    post_attention_layernorm: Any
    pre_feedforward_layernorm: Any  # Gemma 2 and 3
    post_feedforward_layernorm: Any

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        attended, _ = self.self_attn(self.input_layernorm(hidden_states), *args, **kwargs)
        if not hasattr(self, "pre_feedforward_layernorm"):
            normed, total = self.post_attention_layernorm(attended, residual=hidden_states)
            return total + self.mlp(normed)
        attended = self.post_attention_layernorm(attended)  # Gemma 2 and 3 also normalise the output of each branch
        normed, total = self.pre_feedforward_layernorm(attended, residual=hidden_states)
        return total + self.post_feedforward_layernorm(self.mlp(normed))


def projection(module: Any) -> Projection:
    """The current matrices of a linear layer: dense, NF4 or fp8, with or without LoRA."""
    base = getattr(module, "base_layer", module)
    scales = kernel_scales(base)
    if base is module or module.disable_adapters or module.merged:
        return Projection(base.weight, base.bias, scales=scales)
    (name,) = module.active_adapters
    return Projection(
        base.weight,
        base.bias,
        module.lora_A[name].weight,
        module.lora_B[name].weight,
        module.scaling[name],
        getattr(module.lora_dropout[name], "p", 0.0),
        scales,
    )
