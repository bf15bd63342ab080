"""What must not change while a model trains."""

from __future__ import annotations

import torch
from torch import nn

from dist_cpt.adapters.quantize import quantisation_state


class FrozenCopy:
    """Copies of a module's frozen parameters, quantisation state and buffers."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._tensors = {name: tensor.clone() for name, tensor in self._frozen().items()}

    def changed(self) -> list[str]:
        """The names of those whose bytes differ now."""
        now = self._frozen()
        assert now.keys() == self._tensors.keys()
        return [name for name, tensor in self._tensors.items() if _bytes(tensor) != _bytes(now[name])]

    def _frozen(self) -> dict[str, torch.Tensor]:
        parameters = [(name, p.detach()) for name, p in self._module.named_parameters() if not p.requires_grad]
        return dict([*parameters, *quantisation_state(self._module), *self._module.named_buffers()])


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
