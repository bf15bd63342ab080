"""The learning rate of a group as a pure function of the step: a resume needs no scheduler state."""

from __future__ import annotations

import math
from collections.abc import Sequence

from dist_cpt.config.schema import ScheduleConfig, ScheduleShape
from dist_cpt.optim.groups import ParamGroup


def learning_rates(
    schedule: ScheduleConfig, groups: Sequence[ParamGroup], step: int, num_steps: int
) -> dict[str, float]:
    """Learning rate by group name at optimizer step `step` (from 1) of `num_steps`.

    A group that is frozen at first has rate 0 until then, and its whole schedule in the remaining steps.
    """
    rates = {}
    for group in groups:
        same = "adapter" if group.name == "adapter_b" else group.name
        shape = schedule.per_group.get(group.name) or schedule.per_group.get(same) or schedule
        late = group.frozen_steps
        rates[group.name] = group.peak_lr * fraction(shape, step - late, num_steps - late) if step > late else 0.0
    return rates


def fraction(shape: ScheduleShape, step: int, num_steps: int) -> float:
    """Fraction of the peak at `step` (from 1). A warm-up starts above zero, so the first step moves.

    Source: warm-up and cosine as in Loshchilov and Hutter 2017 (arXiv 1608.03983); wsd: Hu et al. 2024
    (arXiv 2404.06395); infinite: Ibrahim et al. 2024 (arXiv 2403.08763), with a cosine cool-down.
    """
    warmup_steps = round(shape.warmup_fraction * num_steps)
    if step <= warmup_steps:
        return step / warmup_steps
    if shape.kind == "constant":
        return 1.0
    if shape.kind == "cosine":
        return _cosine(1.0, shape.end_fraction, _progress(step, warmup_steps, num_steps))
    decay_start = num_steps - round(shape.decay_fraction * num_steps)
    plateau = 1.0
    if shape.kind == "infinite":
        cooldown_end = warmup_steps + round(shape.cooldown_fraction * num_steps)
        plateau = shape.constant_fraction
        if step <= cooldown_end:
            return _cosine(1.0, plateau, _progress(step, warmup_steps, cooldown_end))
    if step <= decay_start:
        return plateau
    return plateau + (min(shape.end_fraction, plateau) - plateau) * _progress(step, decay_start, num_steps)


def _progress(step: int, start: int, stop: int) -> float:
    return min(1.0, (step - start) / max(1, stop - start))


def _cosine(high: float, low: float, progress: float) -> float:
    return low + (high - low) * 0.5 * (1.0 + math.cos(math.pi * progress))
