"""Parameter groups: which tensor trains at which learning rate and decay."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dist_cpt.config.adapter_settings import VOCABULARY_NAMES
from dist_cpt.config.schema import OptimConfig, RunConfig

if TYPE_CHECKING:
    import torch

EIGHT_BIT_GROUPS = ("adapter", "adapter_b", "weights")  # embeddings, head, norms and biases have fp32 moments
_VOCABULARY = re.compile(rf"(^|\.)({'|'.join(VOCABULARY_NAMES)})\.(weight$|lora_)")
DORA_MAGNITUDES = ".lora_magnitude_vector"
_ROUTER = re.compile(r"\.(gate|router)\.(weight|bias)$")
CLASS_HEAD_NAMES = ("score.weight", "base_model.model.score.weight")


@dataclass(frozen=True)
class ParamGroup:
    """Trainable tensors that share a learning rate and a decay, by canonical name, in a fixed order."""

    name: str  # adapter | adapter_b | weights | embeddings | no_decay | head | router
    names: tuple[str, ...]
    peak_lr: float
    weight_decay: float
    frozen_steps: int = 0  # first steps of the run at learning rate 0


def param_groups(
    trainable: Mapping[str, torch.Tensor],
    optim: OptimConfig,
    adapter: bool,
    freeze_rest_steps: int = 0,
    lora_plus_ratio: float | None = None,
) -> list[ParamGroup]:
    """Sort trainable tensors into groups with their peak rates and decays.

    With an adapter: the vocabulary matrices are `embeddings`, DoRA's magnitudes `no_decay`, under LoRA+ the B matrices
    `adapter_b` at `lora_plus_ratio` x `lr`, routers `router`, everything else `adapter`. In full: matrices are
    `weights`, vocabulary matrices `embeddings` at `lr`, vectors `no_decay`. A classification head is `head`. In the
    first `freeze_rest_steps` only `embeddings` move.
    Source: Hayou et al. 2024, LoRA+: Efficient Low Rank Adaptation of Large Models (arXiv 2402.12354).
    """
    members: dict[str, list[str]] = {
        key: [] for key in ("adapter", "adapter_b", "weights", "embeddings", "no_decay", "head", "router")
    }
    for name, tensor in trainable.items():
        if name in CLASS_HEAD_NAMES:
            members["head"].append(name)
        elif _VOCABULARY.search(name):
            members["embeddings"].append(name)
        elif not adapter:
            members["weights" if tensor.ndim > 1 else "no_decay"].append(name)
        elif name.endswith(DORA_MAGNITUDES):
            members["no_decay"].append(name)
        elif _ROUTER.search(name):
            members["router"].append(name)
        else:
            members["adapter_b" if lora_plus_ratio is not None and ".lora_B." in name else "adapter"].append(name)
    return [
        _group(key, tuple(names), optim, (adapter, freeze_rest_steps, lora_plus_ratio))
        for key, names in members.items()
        if names
    ]


def expected_groups(config: RunConfig) -> list[ParamGroup]:
    """The groups that a resolved recipe will train, without their tensors: nothing is loaded."""
    lora = config.adapter.kind == "lora"
    trained = {
        "adapter": lora,
        "adapter_b": config.adapter.lora_plus_ratio is not None,
        "weights": not lora,
        "embeddings": not lora or bool(config.embeddings.train),
        "no_decay": not lora or config.adapter.dora,
        "head": config.task == "classify",
        "router": lora and config.model.router == "train",
    }
    settings = (lora, config.embeddings.freeze_rest_steps, config.adapter.lora_plus_ratio)
    return [_group(key, (), config.optim, settings) for key, trains in trained.items() if trains]


def _group(
    key: str, names: tuple[str, ...], optim: OptimConfig, settings: tuple[bool, int, float | None]
) -> ParamGroup:
    adapter, freeze_rest_steps, lora_plus_ratio = settings
    embedding_lr = optim.embedding_lr if adapter and optim.embedding_lr is not None else optim.lr
    lr = {"adapter_b": optim.lr * (lora_plus_ratio or 1.0), "embeddings": embedding_lr}
    lr |= {"head": optim.head_lr or optim.lr, "router": optim.router_lr or optim.lr / 10}
    decay = {"embeddings": optim.embedding_weight_decay, "no_decay": 0.0, "router": 0.0}
    return ParamGroup(
        key,
        names,
        lr.get(key, optim.lr),
        decay.get(key, optim.weight_decay),
        0 if key == "embeddings" else freeze_rest_steps,
    )


def state_dtype(group: ParamGroup, optim: OptimConfig) -> str:
    """How the moments of a group are stored between steps: `fp32` or `8bit`."""
    return "8bit" if optim.state == "8bit" and group.name in EIGHT_BIT_GROUPS else "fp32"


def eight_bit_names(groups: Sequence[ParamGroup], optim: OptimConfig) -> frozenset[str]:
    """The tensors whose moments are stored in 8 bit."""
    return frozenset(name for group in groups if state_dtype(group, optim) == "8bit" for name in group.names)
