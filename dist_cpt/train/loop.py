"""The training loop: agree at the boundary, accumulate, update, advance, observe.

Everything decided here is decided by all ranks together.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from dist_cpt.data.batch import Batch
from dist_cpt.engines.engine import GradStats
from dist_cpt.errors import DataError, NumericsError
from dist_cpt.health.spikes import Decision, SpikeDetector, decide
from dist_cpt.optim.schedule import learning_rates
from dist_cpt.run_folder.records import StepRecord
from dist_cpt.run_folder.train_state import SourceCounts
from dist_cpt.runtime.collectives import all_reduce_floats, all_reduce_ints
from dist_cpt.runtime.seed import seed_step
from dist_cpt.train.build import Run
from dist_cpt.train.contract import Contract
from dist_cpt.train.held_out import evaluate_all, forgotten
from dist_cpt.train.progress import Progress, StepResult
from dist_cpt.train.sample import write_sample

Outcome = Literal["done", "stopped", "rollback", "forgot"]


def train_loop(run: Run, contract: Contract, progress: Progress) -> tuple[Outcome, Progress]:
    """Train to the last step; `stopped` when saved before it, `rollback` when the spike policy wants to go back,
    `forgot` when `evaluate.forgetting` ends the run.

    Raises:
        NumericsError: too many bad steps in a row, or the trainability contract is broken.
    """
    config, watchdog = run.context.config, run.context.watchdog
    spikes = SpikeDetector(config.health.spike, progress.recent_losses)
    watchdog.tick("training", progress.step)
    for micro_batches in run.steps(progress):
        started = time.perf_counter()
        run.at_boundary(progress)
        agreed = agree_at_boundary(run, progress, micro_batches)
        if agreed.stop:
            watchdog.tick("saving", progress.step)
            run.saver.save_now(progress)
            return "stopped", progress
        if agreed.save:
            watchdog.tick("saving", progress.step)
            run.saver.save(progress)
            watchdog.tick("training", progress.step)
            started = time.perf_counter()

        step = progress.step + 1
        rates = learning_rates(config.schedule, run.groups, step, run.context.shape.num_steps)
        seed_step(config.seed, step, run.context.env.rank)
        loss = _accumulate(run, step, micro_batches, agreed.num_targets)
        contract.before_update(step)
        spike = spikes.observe(loss, progress.bad_in_a_row)
        stats, decision = _update(run, rates, progress, finite=math.isfinite(loss), spike=spike)
        contract.after_update(step, stats.skipped)

        counts = (agreed.num_targets, agreed.counts_by_source)
        result = StepResult(loss, stats.grad_norm, stats.skipped, spike, *counts, tuple(spikes.state()))
        before, progress = progress, progress.advance(run.context.shape, result)
        watchdog.tick("training", progress.step)
        run.context.observers.on_step(_record(run, before, progress, result, rates, time.perf_counter() - started))
        if decision == "rollback":
            return "rollback", progress
        _require_bearable(run, before, progress, result, decision)
        if run.evaluation_due(progress.step):
            evaluate_all(run, progress)
            write_sample(run, progress)
            if forgotten(run, progress):
                return "forgot", progress
            watchdog.tick("training", progress.step)
    return "done", progress


@dataclass(frozen=True)
class Agreed:
    """What all ranks know at a step boundary."""

    stop: bool  # some rank was asked to stop
    save: bool  # rank 0 wants a checkpoint
    num_targets: int  # of the coming step
    counts_by_source: Mapping[str, SourceCounts]  # of the coming step


def agree_at_boundary(run: Run, progress: Progress, micro_batches: Sequence[Batch]) -> Agreed:
    """One all-reduce on the CPU; also collects a save in the background that has ended on all ranks."""
    saver = run.saver
    # The checkpoint from before a bad step must not be pruned by one from after it.
    may_save = not (progress.bad_in_a_row and run.context.config.health.spike.policy == "rollback")
    flags = [run.context.stop_requested, may_save and saver.due(progress.step), saver.ended, saver.failed]
    own = np.sum([batch.counts_by_source for batch in micro_batches], axis=0)  # int64 [num_sources, 3]
    stop, save, ended, failed, *summed = all_reduce_ints([*map(int, flags), *own.reshape(-1).tolist()])
    if ended == run.context.shape.world_size or failed:
        saver.collect()
    by_source = [SourceCounts(*summed[at : at + 3]) for at in range(0, len(summed), 3)]
    num_targets = sum(counts.targets for counts in by_source)
    return Agreed(bool(stop), bool(save), num_targets, dict(zip(run.data.source_names, by_source, strict=True)))


def _accumulate(run: Run, step: int, micro_batches: Sequence[Batch], num_targets: int) -> float:
    """Forward and backward of the step's micro-batches; its mean loss per target token over all ranks, in nats.

    Raises:
        DataError: there is no target token on any rank.
    """
    if num_targets == 0:
        raise DataError(f"step {step} has no target token", remedy="documents need two tokens or more")
    local_loss = torch.zeros((), dtype=torch.float32)
    for number, batch in enumerate(micro_batches):
        last = number == len(micro_batches) - 1
        local_loss = local_loss.to(batch.input_ids.device) + run.engine.accumulate(batch, num_targets, last)
    (loss_sum,) = all_reduce_floats([float(local_loss)])  # host sync, before that of the gradient norm
    return loss_sum / num_targets


def _update(
    run: Run, rates: Mapping[str, float], progress: Progress, *, finite: bool, spike: bool
) -> tuple[GradStats, Decision]:
    """Apply the step, or drop it, as the spike policy decides from its loss; then decide from its gradient."""
    policy, bad_in_a_row = run.context.config.health.spike, progress.bad_in_a_row + 1
    state = {"bad_in_a_row": bad_in_a_row, "rollbacks": len(progress.skipped_windows)}
    decision = decide(finite=finite, spike=spike, config=policy, **state)
    if decision != "apply":
        run.engine.discard()
        return GradStats(math.nan, skipped=True), decision
    stats = run.engine.step(rates)
    return stats, decide(finite=False, spike=False, config=policy, **state) if stats.skipped else decision


def _require_bearable(run: Run, before: Progress, progress: Progress, result: StepResult, decision: Decision) -> None:
    """Raise NumericsError after too many bad steps in a row."""
    config = run.context.config
    too_many = progress.skipped_in_a_row >= config.optim.max_skipped_steps
    if decision == "stop" or (too_many and config.health.spike.policy in ("off", "stop")):
        raise NumericsError(
            f"{progress.bad_in_a_row} bad steps in a row up to step {progress.step} ({progress.skipped_in_a_row} of "
            f"them skipped); the last blocks were {before.next_position} to {progress.position - 1}, the last loss "
            f"{result.loss:.4g}",
            remedy="lower the learning rate or inspect that data; the last checkpoint is older",
        )


def _record(
    run: Run, before: Progress, progress: Progress, result: StepResult, rates: Mapping[str, float], seconds: float
) -> StepRecord:
    """The row of metrics.jsonl for the step between `before` and `progress`."""
    return StepRecord(
        step=progress.step,
        loss=result.loss,
        grad_norm=result.grad_norm if math.isfinite(result.grad_norm) else None,
        skipped=result.skipped,
        spike=result.spike,
        skipped_total=progress.skipped_total,
        lr=dict(rates),
        position=(before.next_position, progress.position),
        num_tokens=result.num_tokens,
        tokens=progress.tokens,
        tokens_by_source={name: counts.tokens for name, counts in result.counts_by_source.items()},
        batch_tokens=progress.step * run.context.config.batch.global_tokens,
        totals_by_source=dict(progress.counts_by_source),
        epochs_by_source=run.data.loader.epochs_read(progress.position),
        tokens_per_second=result.num_tokens / seconds,
        step_seconds=seconds,
        memory_gib=peak_memory_gib(),
        attempt=run.context.attempt,
    )


def peak_memory_gib() -> float:
    """Peak of this process: CUDA memory allocated, or the resident set without a GPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    import resource  # POSIX only, as is the rest of the launcher

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
