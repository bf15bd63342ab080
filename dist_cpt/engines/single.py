"""One process, nothing sharded: fp32 masters beside the copies that compute.

Backward yields gradients in the compute dtype. The first micro-batch's gradient is kept as it is; the second turns it
into an fp32 sum. A bf16 step of one micro-batch thus needs 2 bytes per trainable element, a longer one 4, and rounds
once per micro-batch, never in the sum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import nn

from dist_cpt.config.schema import RunConfig
from dist_cpt.data.batch import Batch
from dist_cpt.engines.engine import LateStats
from dist_cpt.engines.forward import Forward
from dist_cpt.engines.gradients import StepLoss, judge, probe
from dist_cpt.engines.slices import SlicedState, frozen_tensors, storage_bytes
from dist_cpt.errors import ConfigError
from dist_cpt.model.loss import CausalLMForLoss
from dist_cpt.optim.groups import ParamGroup, eight_bit_names
from dist_cpt.optim.optimizer import AdamW, Part
from dist_cpt.runtime.collectives import world_size
from dist_cpt.training_state import ReadingOrder, ReadState


class SingleEngine:
    """The engine of a world of one."""

    kind = "single"

    def __init__(
        self,
        module: CausalLMForLoss,
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
        self._parameters = {name: trainable[name] for group in groups for name in group.names}
        # In fp32 the master and the compute copy are the same tensor, unless the master is in host memory.
        masters = {name: p.data for name, p in self._parameters.items()}
        if config.engine.offloads("optimizer"):
            masters = {name: torch.empty_like(master, device="cpu").copy_(master) for name, master in masters.items()}
        self._adam = AdamW(masters, config.optim, eight_bit_names(groups, config.optim), config.model.kernels)
        self._copies: dict[str, torch.Tensor] | None = None
        if config.model.compute_dtype == "bf16" or config.engine.offloads("optimizer"):
            dtype = torch.bfloat16 if config.model.compute_dtype == "bf16" else torch.float32
            for parameter in self._parameters.values():
                parameter.data = parameter.data.to(dtype)
            self._copies = {name: parameter.data for name, parameter in self._parameters.items()}
        self._grads: dict[str, torch.Tensor] = {}
        self._loss = StepLoss(module.routing)
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

    def accumulate(self, batch: Batch, num_tokens: int, last: bool) -> None:
        loss, loss_sum = self._forward.loss(batch, 1.0 / num_tokens)
        loss.backward()
        self._loss.add(loss_sum, num_tokens)

    def step(self, lrs: Mapping[str, float], spike_limit: float = math.inf) -> LateStats:
        grads = list(self._grads.values())
        means, norm, judged = judge(self._loss, grads, max_norm=self._max_norm, spike_limit=spike_limit)
        clip = judged.to(self._adam.steps.device)
        parts = [
            Part(group.names, [self._gradient(name) for name in group.names], lrs[group.name], group.weight_decay)
            for group in self._groups
        ]
        self._adam.update(parts, clip, self._copies)
        self._adam.steps += 1 - clip.skip
        self._grads.clear()
        return LateStats(means, norm, judged.skip)

    def import_state(self, read: ReadState, step: int, order: ReadingOrder | None = None) -> None:
        self._state.import_(read, order)
        self._adam.steps.fill_(step)
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

    def _gradient(self, name: str) -> torch.Tensor:
        """The gradient of `name`; zeros if backward did not reach the tensor."""
        grad = self._grads.get(name)
        return torch.zeros_like(self._adam.masters[name]) if grad is None else grad

    def _refresh(self) -> None:
        for name, copy in (self._copies or {}).items():
            copy.copy_(self._adam.masters[name])
