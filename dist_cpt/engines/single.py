"""One process, nothing sharded: fp32 masters beside the copies that compute.

Backward yields gradients in the compute dtype. The first micro-batch's gradient is kept as it is; the second turns it
into an fp32 sum. A bf16 step of one micro-batch thus needs 2 bytes per trainable element, a longer one 4, and rounds
once per micro-batch, never in the sum. The norm and the update convert a slice at a time to fp32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import nn

from dist_cpt.config.schema import RunConfig
from dist_cpt.data.batch import Batch
from dist_cpt.engines.engine import GradStats
from dist_cpt.engines.forward import Forward
from dist_cpt.engines.slices import SlicedState, clip_factor, frozen_tensors, global_norm, probe, storage_bytes
from dist_cpt.errors import ConfigError
from dist_cpt.optim.groups import ParamGroup, eight_bit_names
from dist_cpt.optim.optimizer import AdamW
from dist_cpt.runtime.collectives import world_size
from dist_cpt.training_state import ReadingOrder, ReadState

# Per call of the optimizer: bounds the fp32 copies of bf16 gradients. On a GPU small calls cost only launches.
UPDATE_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 24}


class SingleEngine:
    """The engine of a world of one."""

    kind = "single"

    def __init__(
        self,
        module: nn.Module,
        trainable: Mapping[str, nn.Parameter],
        groups: Sequence[ParamGroup],
        config: RunConfig,
        device: torch.device,
    ) -> None:
        if world_size() != 1:
            raise ConfigError(f"engine.kind: single runs on 1 rank, not on {world_size()}", remedy="use fsdp or zero")
        self._module = module.to(device).train()
        self._device = device
        self._groups = list(groups)
        self._max_norm = config.optim.max_grad_norm
        self._update_elements = UPDATE_ELEMENTS[device.type]
        self._parameters = {name: trainable[name] for group in groups for name in group.names}
        # In fp32 the master and the compute copy are the same tensor.
        masters = {name: p.data for name, p in self._parameters.items()}
        self._adam = AdamW(masters, config.optim, eight_bit_names(groups, config.optim))
        if config.model.compute_dtype == "bf16":
            for parameter in self._parameters.values():
                parameter.data = parameter.data.to(torch.bfloat16)
        self._grads: dict[str, torch.Tensor] = {}
        self._hooks = [p.register_post_accumulate_grad_hook(self._keep(n)) for n, p in self._parameters.items()]
        self._state = SlicedState(
            {name: p.shape for name, p in self._parameters.items()},
            {name: (0, p.numel()) for name, p in self._parameters.items()},
            self._adam.read,
            self._adam.write,
            device,
        )
        self.export_state = self._state.export
        self.snapshot = self._state.snapshot
        self._forward = Forward(self._module, device)
        self.evaluate = self._forward.evaluate
        self.logits = self._forward.logits

    def accumulate(self, batch: Batch, num_tokens: int, last: bool) -> torch.Tensor:
        loss, loss_sum = self._forward.loss(batch, 1.0 / num_tokens)
        loss.backward()
        return loss_sum

    def step(self, lrs: Mapping[str, float]) -> GradStats:
        norm = global_norm(self._grads.values(), self._device)
        if not math.isfinite(norm):
            self._grads.clear()
            return GradStats(norm, skipped=True)
        factor = clip_factor(norm, self._max_norm)
        for group in self._groups:
            for names in _portions(group.names, self._parameters, self._update_elements):
                if self._parameters[names[0]].numel() > self._update_elements:
                    self._update_in_slices(names[0], factor, lrs[group.name], group.weight_decay)
                    continue
                grads = [self._fp32_gradient(name, factor) for name in names]
                self._adam.update(names, grads, lrs[group.name], group.weight_decay)
        self._adam.steps += 1
        self._grads.clear()
        self._refresh()
        return GradStats(norm, skipped=False)

    def discard(self) -> None:
        self._grads.clear()

    def import_state(self, read: ReadState, step: int, order: ReadingOrder | None = None) -> None:
        self._state.import_(read, order)
        self._adam.steps = step
        self._refresh()

    def gradient_probe(self) -> dict[str, tuple[float, float]]:
        return probe({name: self._grads.get(name) for name in self._parameters}, self._device)

    def frozen_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        return frozen_tensors(self._module, self._parameters.values())

    def sharded_bytes(self) -> dict[str, int]:
        return storage_bytes(
            trainable=(p.data for p in self._parameters.values()),
            frozen=(tensor for _, tensor in self.frozen_tensors()),
            optimizer=[*self._adam.masters.values(), *self._adam.moments()],
        )

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._grads.clear()

    def _keep(self, name: str) -> Callable[[torch.Tensor], None]:
        def keep(parameter: torch.Tensor) -> None:
            grad, parameter.grad = parameter.grad, None
            assert grad is not None
            kept = self._grads.get(name)
            if kept is None:
                self._grads[name] = grad
            elif kept.dtype == torch.float32:
                kept.add_(grad)
            else:
                self._grads[name] = kept.float().add_(grad)

        return keep

    def _fp32_gradient(self, name: str, factor: float) -> torch.Tensor:
        """The clipped gradient of `name`, which is dropped here; zeros if backward did not reach the tensor."""
        grad = self._grads.pop(name, None)
        if grad is None:
            return torch.zeros_like(self._adam.masters[name])
        return grad.float().mul_(factor) if factor < 1.0 else grad.float()

    def _update_in_slices(self, name: str, factor: float, lr: float, weight_decay: float) -> None:
        """Update one large tensor; an fp32 copy of its whole gradient would raise peak memory."""
        grad = self._grads.pop(name, None)
        if grad is None:
            grad = torch.zeros_like(self._adam.masters[name])
        buffer = torch.empty(self._update_elements, device=grad.device)
        start = 0
        for piece in grad.reshape(-1).split(self._update_elements):
            fp32 = piece if piece.dtype == torch.float32 else buffer[: piece.numel()].copy_(piece)
            if factor < 1.0:
                fp32.mul_(factor)
            self._adam.update_slice(name, start, fp32, lr, weight_decay)
            start += piece.numel()

    def _refresh(self) -> None:
        for name, parameter in self._parameters.items():
            master = self._adam.masters[name]
            if parameter.data_ptr() != master.data_ptr():
                parameter.data.copy_(master)


def _portions(names: Sequence[str], parameters: Mapping[str, nn.Parameter], most: int) -> Iterator[list[str]]:
    """`names` in runs of at most `most` elements; a larger tensor is a run of its own."""
    portion: list[str] = []
    elements = 0
    for name in names:
        if portion and elements + parameters[name].numel() > most:
            yield portion
            portion, elements = [], 0
        portion.append(name)
        elements += parameters[name].numel()
    yield portion
