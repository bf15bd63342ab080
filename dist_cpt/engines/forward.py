"""How every engine calls the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from dist_cpt.data.batch import Batch

Forward = Callable[..., Any]  # the module itself, or the wrapper that an engine puts around it


def scaled_loss(forward: Forward, batch: Batch, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss sum x scale with its graph, loss sum detached), both fp32 [].

    `scale` is a Python number on purpose: a wrapper that casts floating point tensors to bf16 would turn a
    token count of 12345 into 12352.
    """
    return forward(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        cu_seqlens=batch.cu_seqlens,
        max_seqlen=batch.max_seqlen,
        labels=batch.labels,
        scale=scale,
    )


def last_logits(forward: Forward, input_ids: torch.Tensor) -> torch.Tensor:
    """fp32 logits [1, V] after the last of `input_ids` [1, L], taken as one document."""
    length = input_ids.shape[1]
    return forward(
        input_ids=input_ids,
        position_ids=torch.arange(length, device=input_ids.device)[None],
        cu_seqlens=torch.tensor([0, length], dtype=torch.int32, device=input_ids.device),
        max_seqlen=length,
        labels=None,
        scale=1.0,
    )


@contextmanager
def inference(module: nn.Module) -> Iterator[None]:
    """Dropout off and no gradients; training mode again afterwards."""
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        module.train()
