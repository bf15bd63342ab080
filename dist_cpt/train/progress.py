"""Where a run stands: the part of the training state that is not a tensor."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from dist_cpt.config.resolve import StepShape
from dist_cpt.engines.engine import StepStats
from dist_cpt.health.spikes import SpikeWindow
from dist_cpt.run_folder.train_state import SourceCounts, TrainState, past_windows

Windows = tuple[tuple[int, int], ...]  # positions [start, stop) that rollbacks left out; sorted, whole steps


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did, as all ranks know it."""

    stats: StepStats
    spike: bool  # the loss was far above the recent ones
    num_tokens: int  # targets
    counts_by_source: Mapping[str, SourceCounts]
    spikes: SpikeWindow  # after this step


@dataclass(frozen=True)
class Progress:
    """The state after `step` optimizer steps."""

    step: int = 0
    position: int = 0  # global blocks consumed
    tokens: int = 0  # target tokens trained on
    counts_by_source: Mapping[str, SourceCounts] = field(default_factory=dict)  # since step 0
    skipped_total: int = 0
    skipped_in_a_row: int = 0
    optimizer_steps: int = 0  # AdamW's counter
    skipped_windows: Windows = ()
    bad_in_a_row: int = 0  # steps that were skipped or had a spike
    bad_since: tuple[int, int] | None = None  # (step, position) of the first of them
    spikes: SpikeWindow = field(default_factory=SpikeWindow)
    resumed_from: str | None = None  # the checkpoint that this state was read from

    @property
    def next_position(self) -> int:
        """First block of the next step."""
        return past_windows(self.position, self.skipped_windows)

    def advance(self, shape: StepShape, result: StepResult) -> Progress:
        """The state one step later."""
        skipped = result.stats.skipped
        bad = result.spike or skipped
        by_source = dict(self.counts_by_source)
        for name, counts in result.counts_by_source.items():
            by_source[name] = by_source.get(name, SourceCounts()).plus(counts)
        return replace(
            self,
            step=self.step + 1,
            position=self.next_position + shape.blocks_per_step,
            tokens=self.tokens + result.num_tokens,
            counts_by_source=by_source,
            skipped_total=self.skipped_total + skipped,
            skipped_in_a_row=self.skipped_in_a_row + 1 if skipped else 0,
            optimizer_steps=self.optimizer_steps + (not skipped),
            bad_in_a_row=self.bad_in_a_row + 1 if bad else 0,
            bad_since=(self.bad_since or (self.step + 1, self.next_position)) if bad else None,
            spikes=result.spikes,
        )


def progress_of(state: TrainState, checkpoint: str, windows: Windows) -> Progress:
    """The progress that a checkpoint recorded; `windows` already known are kept."""
    blocks, targets = state.blocks_by_source or {}, state.targets_by_source or {}
    return Progress(
        step=state.step,
        position=state.position,
        tokens=state.tokens,
        counts_by_source={
            name: SourceCounts(blocks.get(name, 0), tokens, targets.get(name, 0))
            for name, tokens in state.tokens_by_source.items()
        },
        skipped_total=state.skipped_total,
        skipped_in_a_row=state.skipped_in_a_row,
        optimizer_steps=state.optimizer_steps,
        skipped_windows=tuple(sorted({*windows, *state.skipped_windows})),
        bad_in_a_row=0 if state.bad_since is None else state.step - state.bad_since[0] + 1,
        bad_since=state.bad_since,
        spikes=SpikeWindow(state.recent_losses, math.inf if state.spike_limit is None else state.spike_limit),
        resumed_from=checkpoint,
    )


def step_starts(shape: StepShape, progress: Progress) -> Iterator[int]:
    """First position of every remaining step."""
    position = progress.position
    for _ in range(shape.num_steps - progress.step):
        position = past_windows(position, progress.skipped_windows)
        yield position
        position += shape.blocks_per_step
