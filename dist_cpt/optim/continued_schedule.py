"""The schedule of a run that becomes longer or shorter: what has passed keeps its length in steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dist_cpt.config.exclusions import num_steps
from dist_cpt.config.schema import RunConfig, ScheduleConfig, ScheduleShape
from dist_cpt.errors import ConfigError
from dist_cpt.optim.groups import expected_groups
from dist_cpt.optim.schedule import phases, shape_of

PHASES = ("warmup", "cooldown", "decay")


@dataclass(frozen=True)
class _OfGroup:
    """The schedule of one group, and the steps before it begins."""

    key: str  # in the recipe
    shape: ScheduleShape
    late: int


def last_step_before_decay(config: RunConfig, steps: int) -> int | None:
    """The last of `steps` up to which a longer run has the same rates; None if that is every step, or hardly any."""
    groups = _groups(config)
    if _over_the_whole_run(groups) is not None:
        return None
    starts = {group.late + phases(group.shape, steps - group.late).decay_start for group in groups}
    return min(starts - {steps}, default=None)


def require_extendable(config: RunConfig) -> None:
    """Refuse a longer run under a schedule whose rates depend on its length from the warm-up on.

    Raises:
        ConfigError: names the group's schedule, and what to do instead.
    """
    if (group := _over_the_whole_run(_groups(config))) is not None:
        raise ConfigError(
            f"{group.key}.kind {group.shape.kind} decays over the whole run: the rates so far are those of "
            f"{config.train.tokens:,} tokens",
            remedy="dist-cpt branch RUN --at STEP --name NEW --set train.tokens=N --set 'schedule={kind: wsd}' begins "
            "a schedule at STEP, with a warm-up",
        )


def _over_the_whole_run(groups: Sequence[_OfGroup]) -> _OfGroup | None:
    return next((group for group in groups if group.shape.kind in ("cosine", "linear")), None)


def pinned(config: RunConfig, step: int) -> ScheduleConfig:
    """The schedule with the lengths in steps of phases that begin before the end of `step`, the decay aside.

    The rates up to `step` are then the same whatever the length of the run, as long as no decay begins before.
    """
    schedule, freeze = config.schedule, config.embeddings.freeze_rest_steps
    shapes = dict(schedule.per_group)
    if freeze and "embeddings" in {group.name for group in expected_groups(config)}:
        # The others begin later, so their phases are shorter.
        shapes.setdefault("embeddings", ScheduleShape(**schedule.model_dump(exclude={"per_group", "start_step"})))
    steps = num_steps(config)

    def late(name: str) -> int:
        return max(schedule.start_step, 0 if name == "embeddings" else freeze)

    per_group = {
        name: shape.model_copy(update=_lengths(shape, step - late(name), steps - late(name)))
        for name, shape in shapes.items()
    }
    own = _lengths(schedule, step - late(""), steps - late(""))
    return schedule.model_copy(update=own | {"per_group": per_group})


def _lengths(shape: ScheduleShape, step: int, steps: int) -> dict[str, int | float]:
    """The keys to change in a shape of `steps` of which `step` have passed."""
    ends = phases(shape, steps)
    begun = {"warmup": (step > 0, ends.warmup_end)}
    if shape.kind == "infinite":
        begun["cooldown"] = (step > ends.warmup_end, ends.cooldown_end - ends.warmup_end)
    changed: dict[str, int | float] = {}
    for phase, (has_begun, length) in begun.items():
        if has_begun and getattr(shape, f"{phase}_steps") is None:
            fraction = f"{phase}_fraction"
            changed |= {f"{phase}_steps": length, fraction: ScheduleShape.model_fields[fraction].default}
    return changed


def _groups(config: RunConfig) -> list[_OfGroup]:
    schedule = config.schedule
    own = {id(shape): f"schedule.per_group.{name}" for name, shape in schedule.per_group.items()}
    return [
        _OfGroup(own.get(id(shape), "schedule"), shape, max(schedule.start_step, group.frozen_steps))
        for group in expected_groups(config)
        for shape in [shape_of(schedule, group.name)]
    ]
