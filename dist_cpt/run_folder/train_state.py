"""state.json: the training state beside its tensors, as integers and words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from pydantic import Field, ValidationError

from dist_cpt.config.schema import Frozen
from dist_cpt.errors import CheckpointError
from dist_cpt.run_folder.json_files import canonical_json, strict_json
from dist_cpt.run_folder.names import STATE


class Probe(Frozen):
    """One evaluated batch, evaluated again after a resume: its blocks and its mean loss in nats."""

    block_ids: tuple[int, ...]
    loss: float


class Randomness(Frozen):
    """Rank r's generators at step s are `seed_step(seed, s, r)`: nothing else needs to be saved."""

    seed: int
    step: int
    # For each rank that saved: the seed of its next step, and the first number torch, numpy and Python draw with it.
    next_draws: tuple[tuple[int, ...], ...] = ()


class SourceCounts(NamedTuple):
    """What was read of a source."""

    blocks: int = 0  # sequences of data.seq_len
    tokens: int = 0  # in them, padding aside
    targets: int = 0  # labels

    def plus(self, other: SourceCounts) -> SourceCounts:
        return SourceCounts(*(mine + more for mine, more in zip(self, other, strict=True)))


class Mark(NamedTuple):
    """Where a shard of a streamed source begins in the source's stream."""

    epoch: int
    shard: int  # in the epoch's order
    first_block: int
    epoch_start: int  # first block of the epoch


class TrainState(Frozen):
    """The content of state.json."""

    step: int = Field(ge=0)  # optimizer steps done
    position: int = Field(ge=0)  # packed blocks consumed by the whole job
    tokens: int = Field(ge=0)  # target tokens
    tokens_by_source: dict[str, int]  # padding aside
    blocks_by_source: dict[str, int] | None = None  # None: an earlier version did not count them
    targets_by_source: dict[str, int] | None = None
    skipped_total: int = Field(ge=0)
    skipped_in_a_row: int = Field(default=0, ge=0)
    random: Randomness
    schedule: dict[str, Any]  # as in the recipe; learning rates are a function of the step
    wandb_run_id: str
    attempt: int = Field(ge=0)
    parent: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")  # state_sha256 of the parent checkpoint
    optimizer_steps: int = Field(ge=0)  # AdamW's counter: without skipped steps, with those of an imported optimizer
    skipped_windows: tuple[tuple[int, int], ...] = ()  # blocks left out by a rollback: positions start to stop - 1
    bad_since: tuple[int, int] | None = None  # (step, position) of the first of the bad steps that end here
    recent_losses: tuple[float, ...] = ()  # good ones, which the loss of a later step is compared with
    spike_limit: float | None = None  # of the next step, from the losses before the last one; None: no limit
    next_block_ids: tuple[int, ...]  # of the next optimizer step, all ranks, in stream order
    probe: Probe
    stream: dict[str, Mark] | None = None  # of streamed sources: the shard with the next block


# Keys that are left out of the file while they are None.
_LATER = ("blocks_by_source", "targets_by_source", "spike_limit", "stream")


def state_to_bytes(state: TrainState) -> bytes:
    """The content of state.json for `state`."""
    not_counted = {name for name in _LATER if getattr(state, name) is None}
    return canonical_json(state.model_dump(mode="json", exclude=not_counted))


def state_from_bytes(raw: bytes) -> TrainState:
    """The state in a state.json.

    Raises:
        CheckpointError: not the JSON of a state.
    """
    try:
        return TrainState.model_validate(strict_json(raw))
    except (ValidationError, ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{STATE} is not a training state: {first_line(error)}") from None


def first_line(error: Exception) -> str:
    """An error in one line; for a pydantic error the field and the reason."""
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}"
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def past_windows(position: int, windows: Sequence[tuple[int, int]]) -> int:
    """The first position from `position` on that lies in no window; windows are sorted, whole steps."""
    for start, stop in windows:
        if start <= position < stop:
            position = stop
    return position
