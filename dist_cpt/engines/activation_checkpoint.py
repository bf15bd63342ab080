"""Recompute each decoder layer in the backward pass instead of keeping its activations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def checkpoint_layers(layers: Sequence[nn.Module]) -> None:
    """Make every layer keep only its inputs; loss and gradients are bitwise the same.

    Only the layer's `forward` is replaced: parameter names do not change, and the hooks of a sharding engine run
    around the recomputation. Dropout draws the same mask again.
    """
    for layer in layers:
        layer.forward = _recomputed(layer, layer.forward)


def _recomputed(layer: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    def checkpointed(*args: Any, **kwargs: Any) -> Any:
        if not (layer.training and torch.is_grad_enabled()):
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return checkpointed
