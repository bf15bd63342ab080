"""The training loop: agree at the boundary, issue a step, read what the one before gave.

The host is a step ahead of the device: it reads the loss of a step once the next one is issued, so the device never
waits for it. Everything decided here is decided by all ranks together.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from dist_cpt.data.batch import Batch
from dist_cpt.engines.engine import LateStats, StepStats
from dist_cpt.errors import DataError, NumericsError
from dist_cpt.health.spikes import Verdict, limit_on_device, verdict
from dist_cpt.optim.schedule import learning_rates
from dist_cpt.run_folder.records import StepRecord
from dist_cpt.run_folder.train_state import SourceCounts
from dist_cpt.runtime.collectives import all_reduce_ints, over_group
from dist_cpt.runtime.late_read import Moment
from dist_cpt.runtime.seed import seed_step
from dist_cpt.train.build import Run
from dist_cpt.train.contract import Contract
from dist_cpt.train.held_out import evaluate_all, why_end_early
from dist_cpt.train.progress import Progress, StepResult
from dist_cpt.train.sample import write_sample

Outcome = Literal["done", "stopped", "rollback", "ended early"]


def train_loop(run: Run, contract: Contract, progress: Progress) -> tuple[Outcome, Progress]:
    """Train to the last step; `stopped` when saved before it, `rollback` when the spike policy wants to go back,
    `ended early` when `evaluate.forgetting` or `evaluate.best` ends the run.

    `progress` is what has been read. Before anything that needs the state as it is, every step is.

    Raises:
        NumericsError: too many bad steps in a row, or the trainability contract is broken.
    """
    watchdog, spike_policy = run.context.watchdog, run.context.config.health.spike
    in_flight: deque[IssuedStep] = deque()
    watchdog.tick("training", progress.step)
    for step, micro_batches in enumerate(run.steps(progress), progress.step + 1):
        run.at_boundary(step)
        agreed = agree_at_boundary(run, step, micro_batches)  # while the device works on the step before
        if agreed.stop or agreed.save:
            progress, bad = read_results(run, contract, progress, in_flight, leave=0)
            if bad == "rollback":
                return "rollback", progress
            watchdog.tick("saving", progress.step)
        if agreed.stop:
            run.saver.save_now(progress)
            return "stopped", progress
        if agreed.save and may_save(run, progress):
            run.saver.save(progress)
        watchdog.tick("training", progress.step)

        limit = limit_on_device(progress.spikes, len(in_flight), spike_policy)
        in_flight.append(issue(run, contract, step, micro_batches, agreed, limit))
        at_rest = contract.watching or run.evaluation_due(step) or step == run.context.shape.num_steps
        progress, bad = read_results(run, contract, progress, in_flight, leave=0 if at_rest else 1)
        if bad == "rollback":
            return "rollback", progress
        if run.evaluation_due(step):
            evaluate_all(run, progress)
            write_sample(run, progress)
            if why_end_early(run, progress) is not None:
                return "ended early", progress
            watchdog.tick("training", progress.step)
    return "done", progress


@dataclass(frozen=True)
class Agreed:
    """What all ranks know at a step boundary."""

    stop: bool  # some rank was asked to stop
    save: bool  # rank 0 wants a checkpoint
    num_targets: int  # of the coming step
    counts_by_source: Mapping[str, SourceCounts]  # of the coming step


@dataclass(frozen=True)
class IssuedStep:
    """A step that the device was given, and what the host knows of it before it has read the outcome."""

    rates: Mapping[str, float]
    agreed: Agreed
    watched: bool  # by the trainability contract
    began: Moment
    stats: LateStats


def agree_at_boundary(run: Run, step: int, micro_batches: Sequence[Batch]) -> Agreed:
    """One all-reduce between the CPUs before `step`; also collects a save in the background that has ended on all
    ranks."""
    saver = run.saver
    flags = [run.context.stop_requested, saver.due(step - 1), saver.ended, saver.failed]
    own = np.sum([batch.counts_by_source for batch in micro_batches], axis=0)  # int64 [num_sources, 3]
    with over_group(run.host_group):
        stop, save, ended, failed, *summed = all_reduce_ints([*map(int, flags), *own.reshape(-1).tolist()])
    if ended == run.context.shape.world_size or failed:
        saver.collect()
    by_source = [SourceCounts(*summed[at : at + 3]) for at in range(0, len(summed), 3)]
    num_targets = sum(counts.targets for counts in by_source)
    return Agreed(bool(stop), bool(save), num_targets, dict(zip(run.data.source_names, by_source, strict=True)))


def may_save(run: Run, progress: Progress) -> bool:
    """The checkpoint from before a bad step must not be pruned by one from after it."""
    return not (progress.bad_in_a_row and run.context.config.health.spike.policy == "rollback")


def issue(
    run: Run, contract: Contract, step: int, micro_batches: Sequence[Batch], agreed: Agreed, spike_limit: float
) -> IssuedStep:
    """Give the device a whole step: forward, backward, and the update unless it finds the step bad.

    Raises:
        DataError: there is no target token on any rank.
    """
    config = run.context.config
    if agreed.num_targets == 0:
        raise DataError(f"step {step} has no target token", remedy="documents need two tokens or more")
    rates = learning_rates(config.schedule, run.groups, step, run.context.shape.num_steps)
    seed_step(config.seed, step, run.context.env.rank)
    began = Moment(run.context.device)
    with run.profile.step(step):
        for number, batch in enumerate(micro_batches, 1):
            run.engine.accumulate(batch, agreed.num_targets, last=number == len(micro_batches))
        contract.before_update(step)
        stats = run.engine.step(rates, spike_limit)
    return IssuedStep(rates, agreed, contract.watching, began, stats)


def read_results(
    run: Run, contract: Contract, progress: Progress, in_flight: deque[IssuedStep], leave: int
) -> tuple[Progress, Verdict]:
    """Read and record the oldest steps in flight until `leave` are left: the progress, and what a bad one asks for.

    Raises:
        NumericsError: too many bad steps in a row, or the trainability contract is broken.
    """
    config, rollbacks = run.context.config.health.spike, len(progress.skipped_windows)
    while len(in_flight) > leave:
        issued = in_flight.popleft()
        stats = issued.stats.read()
        if issued.watched:
            contract.after_update(progress.step + 1, stats.skipped)
        spike, window = progress.spikes.observe(stats.loss, progress.bad_in_a_row, config)
        result = StepResult(stats, spike, issued.agreed.num_targets, issued.agreed.counts_by_source, window)
        before, progress = progress, progress.advance(run.context.shape, result)
        run.context.watchdog.tick("training", progress.step)
        run.context.observers.on_step(_record(run, before, progress, issued, result))
        bad = verdict(progress.bad_in_a_row, rollbacks, config)
        if bad == "rollback":
            return progress, bad
        _require_bearable(run, before, progress, stats, bad)
    return progress, "continue"


def _require_bearable(run: Run, before: Progress, progress: Progress, stats: StepStats, bad: Verdict) -> None:
    """Raise NumericsError after too many bad steps in a row."""
    config = run.context.config
    too_many = progress.skipped_in_a_row >= config.optim.max_skipped_steps
    if bad == "stop" or (too_many and config.health.spike.policy in ("off", "stop")):
        raise NumericsError(
            f"{progress.bad_in_a_row} bad steps in a row up to step {progress.step} ({progress.skipped_in_a_row} of "
            f"them skipped); the last blocks were {before.next_position} to {progress.position - 1}, the last loss "
            f"{stats.loss:.4g}",
            remedy="lower the learning rate or inspect that data; the last checkpoint is older",
        )


def _record(run: Run, before: Progress, progress: Progress, issued: IssuedStep, result: StepResult) -> StepRecord:
    """The row of metrics.jsonl for the step between `before` and `progress`."""
    stats, seconds = result.stats, issued.began.seconds_until(issued.stats.arrived)
    return StepRecord(
        step=progress.step,
        loss=stats.loss,
        grad_norm=stats.grad_norm if math.isfinite(stats.grad_norm) else None,
        skipped=stats.skipped,
        spike=result.spike,
        skipped_total=progress.skipped_total,
        lr=dict(issued.rates),
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
        attention_max_over_mean=run.division.max_over_mean(before.next_position),
        mfu=run.efficiency.mfu(seconds),
        memory_bytes=run.efficiency.memory_bytes(),
        experts=None if (routing := run.model.module.routing) is None else routing.as_record(stats.routing),
        attempt=run.context.attempt,
    )


def peak_memory_gib() -> float:
    """Peak of this process: CUDA memory allocated, or the resident set without a GPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    import resource  # POSIX only, as is the rest of the launcher

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
