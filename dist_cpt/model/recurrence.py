"""Recurrent and convolution layers over packed blocks: their state starts anew in each document.

B blocks, L sequence, T = B * L tokens, D model.

The mixers of transformers carry a state along the whole row. Here a mixer's own forward runs once for each document,
with whatever kernels it has: nothing can cross a border. This is the specification, and on every device what runs.
"""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any

import torch
from torch import nn

from dist_cpt.adapters.language_model import recurrent_mixers
from dist_cpt.plan.families import RECURRENT_LAYERS


def recurrent_layers(hf_config: Any) -> list[str]:
    """The types of a model's layers that carry a state from token to token."""
    return sorted(set(getattr(hf_config, "layer_types", None) or ()) & set(RECURRENT_LAYERS))


def install_recurrence(decoder: nn.Module) -> None:
    """Make every recurrent mixer of `decoder` start anew in each document, in place; twice is as once."""
    for mixer in recurrent_mixers(decoder):
        if not isinstance(mixer, ByDocument):
            mixer.__class__ = _by_document(type(mixer))


class ByDocument:
    """A mixer of transformers, given the packing that attention is given; weights and names stay."""

    # Ranks have different numbers of documents: were the parts inside gathered call by call, ZeRO-3 would wait forever.
    gathers_at_once = True
    training: bool

    def forward(
        self, hidden_states: torch.Tensor, *, packing: Any, attention_mask: torch.Tensor | None = None, **_: Any
    ) -> torch.Tensor:
        """[B, L, D] of hidden states [B, L, D].

        Raises:
            ValueError: an attention mask is given.
        """
        if attention_mask is not None:
            raise ValueError("recurrent layers take document boundaries from the packing, not from an attention mask")
        batch, length, _dim = hidden_states.shape
        borders: list[int] = packing.offsets
        if borders == list(range(0, batch * length + 1, length)):  # each block is one document
            return self._mix(hidden_states)
        sizes = [stop - start for start, stop in itertools.pairwise(borders)]
        documents = hidden_states.flatten(0, 1).split(sizes)
        return torch.cat([self._mix(document[None]) for document in documents], dim=1).view(batch, length, -1)

    def _mix(self, hidden_states: torch.Tensor) -> torch.Tensor:
        own: Any = super()
        # Mamba's training kernel multiplies by out_proj's weight itself, past an adapter on it and past quantisation.
        training, self.training = self.training, False
        try:
            return own.forward(hidden_states)
        finally:
            self.training = training


@cache
def _by_document(own: type) -> Any:
    return type(f"ByDocument{own.__name__}", (ByDocument, own), {})
