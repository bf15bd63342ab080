"""Which tensor trains at which learning rate and decay: the list everything else is checked against."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from dist_cpt.config.schema import OptimConfig

EIGHT_BIT_GROUPS = ("adapter", "weights")  # embeddings, head, norms and biases keep fp32 moments
EMBEDDING_SUFFIXES = ("embed_tokens.weight", "lm_head.weight", "wte.weight")


@dataclass(frozen=True)
class ParamGroup:
    """Trainable tensors that share a learning rate and a decay, by canonical name, in a fixed order."""

    name: str  # adapter | embeddings | weights | no_decay
    names: tuple[str, ...]
    peak_lr: float
    weight_decay: float


def param_groups(trainable: Mapping[str, torch.Tensor], optim: OptimConfig, adapter: bool) -> list[ParamGroup]:
    """Sort trainable tensors into groups: adapter and embeddings, or weights, embeddings and no_decay.

    With an adapter run the vocabulary matrices are `embeddings` and everything else is `adapter`. In a
    full-parameter run the matrices are `weights`, the vocabulary matrices `embeddings` (at `lr`: they are
    not beside a faster adapter), and vectors `no_decay`.
    """
    members: dict[str, list[str]] = {"adapter": [], "weights": [], "embeddings": [], "no_decay": []}
    for name, tensor in trainable.items():
        if name.endswith(EMBEDDING_SUFFIXES):
            members["embeddings"].append(name)
        elif adapter:
            members["adapter"].append(name)
        else:
            members["weights" if tensor.ndim > 1 else "no_decay"].append(name)
    embedding_lr = optim.embedding_lr if adapter and optim.embedding_lr is not None else optim.lr
    lr = {"adapter": optim.lr, "weights": optim.lr, "embeddings": embedding_lr, "no_decay": optim.lr}
    decay = {
        "adapter": optim.weight_decay,
        "weights": optim.weight_decay,
        "embeddings": optim.embedding_weight_decay,
        "no_decay": 0.0,
    }
    return [ParamGroup(key, tuple(names), lr[key], decay[key]) for key, names in members.items() if names]


def state_dtype(group: ParamGroup, optim: OptimConfig) -> str:
    """How the moments of a group are kept between steps: `fp32` or `8bit`."""
    return "8bit" if optim.state == "8bit" and group.name in EIGHT_BIT_GROUPS else "fp32"


def eight_bit_names(groups: Sequence[ParamGroup], optim: OptimConfig) -> frozenset[str]:
    """The tensors whose moments are kept in 8 bit."""
    return frozenset(name for group in groups if state_dtype(group, optim) == "8bit" for name in group.names)
