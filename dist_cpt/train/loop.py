"""The loop, as prose: take the step's micro-batches, count targets, accumulate, step, observe, save.

Everything that is decided here is decided by all ranks together, at the step boundary, from one all-reduce.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch

from dist_cpt.config.resolve import StepShape
from dist_cpt.config.schema import RunConfig
from dist_cpt.data.batch import Batch
from dist_cpt.engines.engine import Engine, GradStats
from dist_cpt.errors import DataError, NumericsError
from dist_cpt.health.spikes import Decision, SpikeDetector, decide
from dist_cpt.health.watchdog import Phase
from dist_cpt.optim.groups import ParamGroup
from dist_cpt.optim.schedule import learning_rates
from dist_cpt.run_folder.records import StepRecord
from dist_cpt.run_folder.train_state import TrainState
from dist_cpt.runtime.collectives import all_reduce_floats, all_reduce_ints
from dist_cpt.runtime.seed import seed_step
from dist_cpt.train.contract import Contract
from dist_cpt.train.saver import Saver

Outcome = Literal["done", "stopped", "rollback"]


@dataclass
class Progress:
    """Where the run stands; the part of the training state that is no tensor."""

    step: int = 0
    position: int = 0  # global blocks consumed
    tokens: int = 0  # target tokens trained on
    tokens_by_source: dict[str, int] = field(default_factory=dict)
    skipped_total: int = 0
    skipped_in_a_row: int = 0
    optimizer_steps: int = 0  # AdamW's counter
    skipped_windows: list[tuple[int, int]] = field(default_factory=list)  # positions left out, one per rollback
    bad_in_a_row: int = 0  # steps that were skipped or had a spike
    bad_since: tuple[int, int] | None = None  # (step, position) of the first bad step in a row that still lasts
    recent_losses: list[float] = field(default_factory=list)  # accepted ones, for the spike detector

    def restore(self, state: TrainState) -> None:
        """Stand where a checkpoint was saved; windows that are known already stay."""
        self.step, self.position, self.tokens = state.step, state.position, state.tokens
        self.tokens_by_source = dict(state.tokens_by_source)
        self.skipped_total, self.skipped_in_a_row = state.skipped_total, state.skipped_in_a_row
        self.optimizer_steps = state.optimizer_steps
        self.skipped_windows = sorted({*self.skipped_windows, *state.skipped_windows})
        self.bad_in_a_row = 0 if state.bad_since is None else state.step - state.bad_since[0] + 1
        self.bad_since, self.recent_losses = state.bad_since, list(state.recent_losses)


@dataclass(frozen=True)
class Hooks:
    """What the loop calls; none of them may change the training state."""

    batches: Callable[[int], Iterator[list[Batch]]]  # (first position) -> the micro-batches of step after step
    at_boundary: Callable[[int], None]  # (steps done) before anything of the next step
    phase: Callable[[Phase, int], None]  # what this rank does from now on, for whoever watches it
    stop_requested: Callable[[], bool]  # on any rank
    saver: Saver
    state: Callable[[], TrainState]  # what a checkpoint says beside its tensors; collective
    evaluation_due: Callable[[int], bool]
    evaluate: Callable[[int], None]
    on_step: Callable[[StepRecord], None]


def train_loop(
    config: RunConfig,
    shape: StepShape,
    engine: Engine,
    groups: Sequence[ParamGroup],
    contract: Contract,
    progress: Progress,
    hooks: Hooks,
    *,
    source_names: Sequence[str],
    rank: int,
    attempt: int,
) -> Outcome:
    """Train to the last step; `stopped` when saved before it, `rollback` when the policy wants to go back.

    Raises:
        NumericsError: too many bad steps in a row, or the trainability contract is broken.
    """
    detector = SpikeDetector(config.health.spike, progress.recent_losses)
    for micro_batches in hooks.batches(progress.position):
        started = time.perf_counter()
        hooks.at_boundary(progress.step)
        saver = hooks.saver
        # The checkpoint from before a bad step must not be pruned by one from after it.
        may_save = not (progress.bad_in_a_row and config.health.spike.policy == "rollback")
        flags = [hooks.stop_requested(), may_save and saver.due(progress.step), saver.ended, saver.failed]
        targets = sum(batch.num_targets for batch in micro_batches)
        by_source = np.sum([batch.tokens_by_source for batch in micro_batches], axis=0).tolist()
        counts = all_reduce_ints([targets, *map(int, flags), *by_source])
        num_targets, stop, save, ended, failed, *source_tokens = counts
        if ended == shape.world_size or failed:
            saver.collect()
        if stop or save:
            hooks.phase("saving", progress.step)
        if stop:
            saver.save_now(progress.step, hooks.state)
            return "stopped"
        if save:
            saver.save(progress.step, hooks.state)
            hooks.phase("training", progress.step)
            started = time.perf_counter()
        if num_targets == 0:
            raise DataError(f"step {progress.step + 1} has no target token", remedy="documents need two tokens or more")

        step = progress.step + 1
        lrs = learning_rates(config.schedule, groups, step, shape.num_steps)
        seed_step(config.seed, step, rank)
        local_loss = torch.zeros((), dtype=torch.float32)
        for number, batch in enumerate(micro_batches):
            last = number == len(micro_batches) - 1
            local_loss = local_loss.to(batch.input_ids.device) + engine.accumulate(batch, num_targets, last)
        contract.before_update(step)
        (loss_sum,) = all_reduce_floats([float(local_loss)])  # host sync, before that of the gradient norm
        loss = loss_sum / num_targets
        spike = detector.observe(loss, progress.bad_in_a_row)
        stats, decision = _update(config, engine, lrs, progress, finite=math.isfinite(loss), spike=spike)
        contract.after_update(step, stats.skipped)
        seconds = time.perf_counter() - started

        before = past_windows(progress.position, progress.skipped_windows)
        progress.step = step
        progress.position = before + shape.blocks_per_step
        progress.tokens += num_targets
        ledger = dict(zip(source_names, source_tokens, strict=True))
        for name, count in ledger.items():
            progress.tokens_by_source[name] = progress.tokens_by_source.get(name, 0) + count
        progress.optimizer_steps += not stats.skipped
        progress.skipped_total += stats.skipped
        progress.skipped_in_a_row = progress.skipped_in_a_row + 1 if stats.skipped else 0
        if not (spike or stats.skipped):
            progress.bad_in_a_row, progress.bad_since = 0, None
        else:
            progress.bad_in_a_row += 1
            progress.bad_since = progress.bad_since or (step, before)
        progress.recent_losses = detector.state()
        hooks.on_step(
            StepRecord(
                step=step,
                loss=loss,
                grad_norm=stats.grad_norm if math.isfinite(stats.grad_norm) else None,
                skipped=stats.skipped,
                spike=spike,
                skipped_total=progress.skipped_total,
                lr=lrs,
                position=(before, progress.position),
                num_tokens=num_targets,
                tokens=progress.tokens,
                tokens_by_source=ledger,
                tokens_per_second=num_targets / seconds,
                step_seconds=seconds,
                memory_gib=peak_memory_gib(),
                attempt=attempt,
            )
        )
        if decision == "rollback":
            return "rollback"
        unbearable = progress.skipped_in_a_row >= config.optim.max_skipped_steps
        if decision == "stop" or (unbearable and config.health.spike.policy in ("off", "stop")):
            raise NumericsError(
                f"{progress.bad_in_a_row} bad steps in a row up to step {step} ({progress.skipped_in_a_row} of them "
                f"skipped); the last blocks were {before} to {progress.position - 1}, the last loss {loss:.4g}",
                remedy="lower the learning rate or look at that data; the last checkpoint is from before",
            )
        if hooks.evaluation_due(step):
            hooks.phase("evaluating", step)
            hooks.evaluate(step)
            hooks.phase("training", step)
    return "done"


def _update(
    config: RunConfig, engine: Engine, lrs: Mapping[str, float], progress: Progress, *, finite: bool, spike: bool
) -> tuple[GradStats, Decision]:
    """Apply the step, or drop it, as the policy says of its loss; then what it says of its gradient."""

    def judge(finite: bool, spike: bool) -> Decision:
        return decide(
            finite=finite,
            spike=spike,
            bad_in_a_row=progress.bad_in_a_row + 1,
            rollbacks=len(progress.skipped_windows),
            config=config.health.spike,
        )

    decision = judge(finite, spike)
    if decision != "apply":
        engine.discard()
        return GradStats(math.nan, skipped=True), decision
    stats = engine.step(lrs)
    return stats, judge(finite=False, spike=False) if stats.skipped else decision


def past_windows(position: int, windows: Sequence[tuple[int, int]]) -> int:
    """The first position from `position` on that lies in no window; windows are sorted, whole steps."""
    for start, stop in windows:
        if start <= position < stop:
            position = stop
    return position


def step_starts(shape: StepShape, position: int, windows: Sequence[tuple[int, int]], step: int) -> Iterator[int]:
    """First position of every step after `step`."""
    for _ in range(shape.num_steps - step):
        position = past_windows(position, windows)
        yield position
        position += shape.blocks_per_step


def step_positions(shape: StepShape, position: int, rank: int) -> list[list[int]]:
    """Global block positions of each micro-batch of the step that starts at `position`, for one rank."""
    per_forward = shape.world_size * shape.micro_batch
    return [
        [position + m * per_forward + rank * shape.micro_batch + i for i in range(shape.micro_batch)]
        for m in range(shape.accumulation)
    ]


def peak_memory_gib() -> float:
    """Peak of this process: CUDA memory allocated, or the resident set without a GPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    import resource  # POSIX only, as is the rest of the launcher

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
