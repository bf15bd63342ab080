"""Model FLOPs utilisation of a step, and the device memory of a rank by part.

MFU is what the model needs, forward and backward without recomputation, in a step's tokens, over the seconds of the
step and the data sheet's dense bf16 peak of all ranks. A frozen weight has no gradient: under LoRA a base map counts
4 FLOPs per parameter and token, the adapters' own 6 (`plan/step_model.py`). A token counts as one of a full sequence,
padding and packing included.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dist_cpt.config.schema import RunConfig
from dist_cpt.engines.engine import InspectableEngine
from dist_cpt.errors import ConfigError
from dist_cpt.plan.devices import known_device, machine_here
from dist_cpt.plan.memory import gradient_bytes
from dist_cpt.plan.plan import model_config, placement_of
from dist_cpt.plan.shapes import shapes_of
from dist_cpt.plan.step_model import token_work
from dist_cpt.plan.tensors import Training, training_of
from dist_cpt.train.attempt import RunContext


@dataclass(frozen=True)
class Efficiency:
    """What turns a step's seconds and a rank's peak into shares."""

    least_seconds: float | None  # of a step at the device's peak; None: an unknown device, model or dtype
    state_bytes: dict[str, int]  # of this rank: frozen, trainable, optimizer and, of a known model, gradients

    def mfu(self, seconds: float) -> float | None:
        return None if self.least_seconds is None else self.least_seconds / seconds

    def memory_bytes(self) -> dict[str, int] | None:
        """Bytes at the allocator's peak so far, by part; None without a GPU, whose host memory also has libraries."""
        if not torch.cuda.is_available():
            return None
        rest = torch.cuda.max_memory_allocated() - sum(self.state_bytes.values())
        return self.state_bytes | {"activations and buffers": max(0, rest)}


def open_efficiency(context: RunContext, config: RunConfig, engine: InspectableEngine) -> Efficiency:
    """For a run of `config` with the vocabulary that trains; a model without a table of shapes has no MFU."""
    state = engine.sharded_bytes()
    if context.device.type != "cuda":  # no peak to compare with, no allocator to ask
        return Efficiency(None, state)
    try:
        training = training_of(config, shapes_of(model_config(config)))
    except ConfigError:
        return Efficiency(None, state)
    env = context.env
    machine = machine_here(None, 0, env.world_size, env.local_world_size)
    placement = placement_of(config, machine)
    accumulation = context.shape.accumulation
    return Efficiency(
        _least_seconds(context, config, training),
        state | {"gradients": gradient_bytes(training, placement, accumulation)},
    )


def _least_seconds(context: RunContext, config: RunConfig, training: Training) -> float | None:
    device = known_device(torch.cuda.get_device_properties(context.device).name)
    if device is None or config.model.compute_dtype != "bf16":
        return None
    work = token_work(training, config.data.seq_len)
    return work.model_flops * config.batch.global_tokens / (device.peak * context.env.world_size)
