"""How every engine calls the model."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from dist_cpt.data.batch import Batch


class Forward:
    """Calls a model, or an engine's wrapper around it, with batches moved to its device."""

    def __init__(
        self, model: nn.Module, device: torch.device, after_inference: Callable[[], None] = lambda: None
    ) -> None:
        self._model = model
        self._device = device
        self._after_inference = after_inference

    def loss(self, batch: Batch, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        """(loss sum x scale with its graph, loss sum detached), both fp32 [].

        `scale` is a Python number: a wrapper that casts floating point tensors to bf16 would round it.
        """
        batch = batch.to(self._device)
        return self._model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            cu_seqlens=batch.cu_seqlens,
            max_seqlen=batch.max_seqlen,
            labels=batch.labels,
            scale=scale,
            num_parts=batch.num_parts,
        )

    def evaluate(self, batch: Batch) -> torch.Tensor:
        """The loss sum, fp32 [], without gradients or dropout."""
        return self._inference(lambda: self.loss(batch, 1.0)[1])

    def logits(self, input_ids: torch.Tensor) -> torch.Tensor:
        """fp32 logits [1, V] after the last of `input_ids` [1, L], as one document."""
        length = input_ids.shape[1]
        return self._inference(
            lambda: self._model(
                input_ids=input_ids.to(self._device),
                position_ids=torch.arange(length, device=self._device)[None],
                cu_seqlens=torch.tensor([0, length], dtype=torch.int32, device=self._device),
                max_seqlen=length,
                labels=None,
                scale=1.0,
            )
        )

    def _inference(self, call: Callable[[], torch.Tensor]) -> torch.Tensor:
        self._model.eval()
        try:
            with torch.no_grad():
                return call()
        finally:
            self._model.train()
            self._after_inference()
