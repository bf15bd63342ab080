"""The learning rate of a group as a pure function of the step: a resume needs no scheduler state."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dist_cpt.config.exclusions import num_steps as steps_of
from dist_cpt.config.schema import RunConfig, ScheduleConfig, ScheduleShape
from dist_cpt.optim.groups import ParamGroup, expected_groups


def learning_rates(
    schedule: ScheduleConfig, groups: Sequence[ParamGroup], step: int, num_steps: int
) -> dict[str, float]:
    """Learning rate by group name at optimizer step `step` (from 1) of `num_steps`.

    A group that is frozen at first has rate 0 until then, and its whole schedule in the remaining steps; so has every
    group of a schedule that begins later.
    """
    rates = {}
    for group in groups:
        late = max(group.frozen_steps, schedule.start_step)
        shape = shape_of(schedule, group.name)
        rates[group.name] = group.peak_lr * fraction(shape, step - late, num_steps - late) if step > late else 0.0
    return rates


def rates_at(config: RunConfig, step: int) -> dict[str, float]:
    """Learning rate by group name at a step (from 1) of a resolved recipe."""
    return learning_rates(config.schedule, expected_groups(config), step, steps_of(config))


def shape_of(schedule: ScheduleConfig, group: str) -> ScheduleShape:
    """The schedule of a group: its own, the adapter's for `adapter_b`, else that of the recipe."""
    same = "adapter" if group == "adapter_b" else group
    return schedule.per_group.get(group) or schedule.per_group.get(same) or schedule


@dataclass(frozen=True)
class Phases:
    """Where the phases of a schedule end, in steps since its beginning."""

    warmup_end: int
    cooldown_end: int  # that of the warm-up where there is no cool-down
    decay_start: int  # the last step before the rate falls for good


def phases(shape: ScheduleShape, num_steps: int) -> Phases:
    """The phases of a schedule of `num_steps`."""

    def length(steps: int | None, of_run: float) -> int:
        return round(of_run * num_steps) if steps is None else steps

    warmup_end = cooldown_end = length(shape.warmup_steps, shape.warmup_fraction)
    if shape.kind == "infinite":
        cooldown_end += length(shape.cooldown_steps, shape.cooldown_fraction)
    if shape.kind in ("wsd", "infinite"):
        return Phases(warmup_end, cooldown_end, num_steps - length(shape.decay_steps, shape.decay_fraction))
    return Phases(warmup_end, cooldown_end, num_steps if shape.kind == "constant" else warmup_end)


def fraction(shape: ScheduleShape, step: int, num_steps: int) -> float:
    """Fraction of the peak at `step` (from 1). A warm-up starts above zero, so the first step moves.

    Source: warm-up and cosine as in Loshchilov and Hutter 2017 (arXiv 1608.03983); wsd: Hu et al. 2024
    (arXiv 2404.06395), its 1-sqrt decay: Hägele et al. 2024 (arXiv 2405.18392); infinite, and the warm-up from where an
    earlier schedule ended: Ibrahim et al. 2024 (arXiv 2403.08763), with a cosine cool-down.
    """
    ends = phases(shape, num_steps)
    if step <= ends.warmup_end:
        return shape.start_fraction + (1.0 - shape.start_fraction) * (step / ends.warmup_end)
    if shape.kind == "constant":
        return 1.0
    if shape.kind == "cosine":
        return _cosine(1.0, shape.end_fraction, _progress(step, ends.warmup_end, num_steps))
    plateau = shape.constant_fraction if shape.kind == "infinite" else 1.0
    if step <= ends.cooldown_end:
        return _cosine(1.0, plateau, _progress(step, ends.warmup_end, ends.cooldown_end))
    if step <= ends.decay_start:
        return plateau
    progress = _progress(step, ends.decay_start, num_steps)
    return plateau + (min(shape.end_fraction, plateau) - plateau) * (
        math.sqrt(progress) if shape.decay == "1-sqrt" else progress
    )


def _progress(step: int, start: int, stop: int) -> float:
    return min(1.0, (step - start) / max(1, stop - start))


def _cosine(high: float, low: float, progress: float) -> float:
    return low + (high - low) * 0.5 * (1.0 + math.cos(math.pi * progress))
