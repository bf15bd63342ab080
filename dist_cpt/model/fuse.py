"""Swap a model's modules for fused ones, following the table of architectures, and record which are not and why.

Called once, after the adapter is in place and before an engine wraps the model. A class is swapped only if it is
transformers' own for a model type in `FUSABLE`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from dist_cpt_kernels.dispatch import available
from torch import nn

from dist_cpt.adapters.quantize import kernel_scales
from dist_cpt.errors import ConfigError
from dist_cpt.model.architectures import FUSABLE, Fusable, Parts
from dist_cpt.model.fused_modules import FusedAttention, FusedEmbedding, FusedLayer, FusedMlp, FusedNorm, FusedRotary

ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu_exact"}
OPERATIONS = ("rms_norm", "add_rms_norm", "rope", "qkv", "o", "mlp", "gated", "embedding", "linear_cross_entropy")


@dataclass
class Fusion:
    """The modules that run fused, and those left to transformers and torch, by operation."""

    fused: dict[str, int] = field(default_factory=lambda: defaultdict(int))  # operation -> number of modules
    left: dict[str, dict[str, int]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(int)))
    swapped: list[tuple[nn.Module, type]] = field(default_factory=list)  # with their original classes

    def add(self, operation: str, reason: str | None) -> bool:
        """Count one module; returns whether it is fused, which is the case if `reason` is None."""
        if reason is None:
            self.fused[operation] += 1
        else:
            self.left[operation][reason] += 1
        return reason is None

    def swap(self, module: nn.Module, fused_class: type) -> None:
        self.swapped.append((module, type(module)))
        module.__class__ = fused_class

    def as_json(self) -> dict[str, Any]:
        """For contract.json: {"fused": {operation: modules}, "left": {operation: {reason: modules}}}."""
        return {
            "fused": {name: self.fused[name] for name in OPERATIONS if name in self.fused},
            "left": {name: dict(self.left[name]) for name in OPERATIONS if name in self.left},
        }


def fuse(model: Any, parts: Parts, kernels: str, device: torch.device) -> Fusion:
    """Swap the classes of `model`'s modules as the recipe's `model.kernels` asks; `model` may have an adapter.

    "reference" swaps nothing, "auto" what can run on `device`, "triton" everything.

    Raises:
        ConfigError: "triton", and a part of the model cannot run fused here.
    """
    fusion = Fusion()
    if kernels == "reference":
        return fusion
    on_device = torch.empty(0, device=device)
    if not available(on_device):
        reason = "Triton is not installed" if device.type == "cuda" else f"kernels run on a GPU, not on {device.type}"
        if kernels == "triton":
            raise ConfigError(f"model.kernels: triton: {reason}", remedy="use model.kernels: auto or reference")
        for operation in OPERATIONS:
            fusion.left[operation][reason] = 1
        return fusion
    _fuse_vocabulary(fusion, parts)
    kind = model.config.get_text_config().model_type
    table = FUSABLE.get(kind)
    if table is None:
        for operation in ("rms_norm", "rope", "qkv", "o", "mlp"):
            fusion.add(operation, f"model type {kind} is not in the table ({', '.join(FUSABLE)})")
    else:
        _fuse_layers(fusion, table, parts)
    if kernels == "triton" and fusion.left:
        reasons = "; ".join(f"{name}: {reason}" for name, counts in fusion.left.items() for reason in counts)
        raise ConfigError(
            f"model.kernels: triton: parts of this model cannot be fused: {reasons}",
            remedy="use model.kernels: auto",
        )
    return fusion


def _fuse_vocabulary(fusion: Fusion, parts: Parts) -> None:
    fusion.add("linear_cross_entropy", None)  # the head already is the loss, which dispatches on the device itself
    embeddings = parts.embeddings
    if not embeddings.weight.requires_grad:
        return
    reason = None
    if embeddings.max_norm is not None or embeddings.sparse or embeddings.scale_grad_by_freq:
        reason = "max_norm, sparse or scale_grad_by_freq is set"
    if fusion.add("embedding", reason):
        # After the class in the MRO, so that Gemma's forward, which scales its parent's result, still runs.
        plain = type(embeddings) is nn.Embedding
        fusion.swap(embeddings, FusedEmbedding if plain else _behind(type(embeddings), FusedEmbedding))


def _fuse_layers(fusion: Fusion, table: Fusable, parts: Parts) -> None:
    norms: list[Any] = [m for m in parts.decoder.modules() if _is(m, table, "RMSNorm")]
    for norm in norms:
        if fusion.add("rms_norm", _foreign(norm)):
            norm.epsilon = norm.eps if table.casting == "gemma" else norm.variance_epsilon
            norm.casting = table.casting
            fusion.swap(norm, _before(FusedNorm, type(norm)))
    rotaries = [m for m in parts.decoder.modules() if _is(m, table, "RotaryEmbedding")]
    attentions = [m for m in parts.decoder.modules() if _is(m, table, "Attention")]
    # The rotary module and attention are swapped together: one reads the other's output.
    reasons = {reason for module in (*rotaries, *attentions) if (reason := _foreign(module))}
    reason = "; ".join(sorted(reasons)) or (None if rotaries and attentions else "no rotary attention found")
    for attention in attentions:
        if fusion.add("rope", reason):
            _fuse_attention(fusion, table, attention)
        else:
            fusion.add("qkv", reason)
            fusion.add("o", reason)
    for rotary in rotaries if reason is None else ():
        fusion.swap(rotary, _before(FusedRotary, type(rotary)))
    for mlp in (m for m in parts.decoder.modules() if _is(m, table, "MLP")):
        _fuse_mlp(fusion, mlp)
    for layer in parts.layers:
        if fusion.add("add_rms_norm", _why_not_layer(layer, table)):
            fusion.swap(layer, _before(FusedLayer, type(layer)))


def _fuse_attention(fusion: Fusion, table: Fusable, attention: Any) -> None:
    packed = hasattr(attention, "qkv_proj")
    inputs = [attention.qkv_proj] if packed else [attention.q_proj, attention.k_proj, attention.v_proj]
    groups = {"qkv": inputs, "o": [attention.o_proj]}
    attention.fused_projections = frozenset(
        name for name, modules in groups.items() if fusion.add(name, _why_not_linear(modules))
    )
    attention.gathers_at_once = bool(attention.fused_projections)
    attention.window = getattr(attention if table.window == "layer" else attention.config, "sliding_window", None)
    if table.window == "none":
        attention.window = None
    attention.softcap = attention.attn_logit_softcapping if table.softcap else None
    fusion.swap(attention, _before(FusedAttention, type(attention)))


def _fuse_mlp(fusion: Fusion, mlp: Any) -> None:
    activation = getattr(mlp.config, "hidden_act", None) or mlp.config.hidden_activation
    reason = _foreign(mlp) or (None if activation in ACTIVATIONS else f"the activation {activation} is not implemented")
    if not fusion.add("gated", reason):
        fusion.add("mlp", reason)
        return
    names = ("gate_up_proj", "down_proj") if hasattr(mlp, "gate_up_proj") else ("gate_proj", "up_proj", "down_proj")
    fused = fusion.add("mlp", _why_not_linear([getattr(mlp, name) for name in names]))
    mlp.fused_projections = frozenset(["mlp"] if fused else [])
    mlp.gathers_at_once = fused
    mlp.activation = ACTIVATIONS[activation]
    fusion.swap(mlp, _before(FusedMlp, type(mlp)))


def _why_not_layer(layer: Any, table: Fusable) -> str | None:
    if not _is(layer, table, "DecoderLayer"):
        return f"the layer is a {type(layer).__name__}"
    names = ["input_layernorm", "post_attention_layernorm"]
    names += ["pre_feedforward_layernorm", "post_feedforward_layernorm"] if table.casting == "gemma" else []
    if not all(isinstance(getattr(layer, name, None), FusedNorm) for name in names):
        return "its norms are not fused"
    if any(isinstance(child, nn.Dropout) and child.p > 0 for child in layer.children()):
        return "dropout on the residual stream"
    return _foreign(layer)


def _why_not_linear(modules: Iterable[Any]) -> str | None:
    return next((reason for module in modules if (reason := _why_not_one_linear(module))), None)


def _why_not_one_linear(module: Any) -> str | None:
    base = getattr(module, "base_layer", module)
    if kernel_scales(base) is None and type(base) is not nn.Linear:
        return f"a projection is a {type(base).__name__}"
    if base is module:
        return None
    if len(module.active_adapters) != 1 or len(module.lora_A) != 1:
        return "several adapters on one projection"
    (name,) = module.active_adapters
    if name in module.lora_variant:
        return f"the adapter is a {type(module.lora_variant[name]).__name__}, not plain LoRA"
    if module.lora_bias.get(name) or getattr(module, "fan_in_fan_out", False):
        return "the adapter has a bias or transposed weights"
    return None


def _is(module: nn.Module, table: Fusable, part: str) -> bool:
    return type(module).__name__ == f"{table.prefix}{part}"


def _foreign(module: nn.Module) -> str | None:
    """Why a module may not compute what its class name suggests: another package's code, or a patched forward."""
    if not type(module).__module__.startswith("transformers.models."):
        return f"{type(module).__name__} is not transformers' own"
    return f"{type(module).__name__} has a forward of its own" if "forward" in vars(module) else None


@cache
def _before(mixin: type, original: type) -> type:
    """A class whose `mixin` overrides `original`."""
    return type(f"Fused{original.__name__}", (mixin, original), {"__module__": __name__})


@cache
def _behind(original: type, mixin: type) -> type:
    """A class whose `original` overrides `mixin`, and may call it through super()."""
    return type(f"Fused{original.__name__}", (original, mixin), {"__module__": __name__})
