"""The loop, as prose: take the step's micro-batches, count targets, accumulate, step, observe, save.

Everything that is decided here is decided by all ranks together, at the step boundary, from one all-reduce.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from dist_cpt.config.resolve import StepShape
from dist_cpt.config.schema import RunConfig
from dist_cpt.data.batch import Batch
from dist_cpt.engines.engine import Engine
from dist_cpt.errors import DataError, NumericsError
from dist_cpt.optim.groups import ParamGroup
from dist_cpt.optim.schedule import learning_rates
from dist_cpt.runtime.collectives import all_reduce_floats, all_reduce_ints
from dist_cpt.runtime.seed import seed_step
from dist_cpt.train.contract import Contract
from dist_cpt.train.observers import StepRecord


@dataclass
class Progress:
    """Where the run stands; the part of the training state that is no tensor."""

    step: int = 0
    position: int = 0  # global blocks consumed
    tokens: int = 0  # target tokens trained on
    tokens_by_source: dict[str, int] = field(default_factory=dict)
    skipped_total: int = 0
    skipped_in_a_row: int = 0
    saved_step: int = -1  # the step of the newest checkpoint


@dataclass(frozen=True)
class Hooks:
    """What the loop calls; none of them may change the training state."""

    batches: Callable[[int], Iterator[list[Batch]]]  # (first position) -> the micro-batches of step after step
    stop_requested: Callable[[], bool]  # on any rank
    save_due: Callable[[int], bool]  # (step) on rank 0
    save: Callable[[Progress], None]
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
) -> bool:
    """Train to the last step; True when done, False when stopped (and saved) before.

    Raises:
        NumericsError: too many non-finite steps in a row, or the trainability contract is broken.
    """
    for micro_batches in hooks.batches(progress.position):
        started = time.perf_counter()
        flags = [int(hooks.stop_requested()), int(hooks.save_due(progress.step))]
        targets = sum(batch.num_targets for batch in micro_batches)
        by_source = np.sum([batch.tokens_by_source for batch in micro_batches], axis=0).tolist()
        num_targets, stop, save, *source_tokens = all_reduce_ints([targets, *flags, *by_source])
        if (stop or save) and progress.saved_step != progress.step:
            hooks.save(progress)
            started = time.perf_counter()
        if stop:
            return False
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
        stats = engine.step(lrs)
        contract.after_update(step, stats.skipped)
        (loss_sum,) = all_reduce_floats([float(local_loss)])  # host sync, once per step
        seconds = time.perf_counter() - started

        before = progress.position
        progress.step = step
        progress.position += shape.blocks_per_step
        progress.tokens += num_targets
        ledger = dict(zip(source_names, source_tokens, strict=True))
        for name, count in ledger.items():
            progress.tokens_by_source[name] = progress.tokens_by_source.get(name, 0) + count
        progress.skipped_total += stats.skipped
        progress.skipped_in_a_row = progress.skipped_in_a_row + 1 if stats.skipped else 0
        hooks.on_step(
            StepRecord(
                step=step,
                loss=loss_sum / num_targets,
                grad_norm=stats.grad_norm if math.isfinite(stats.grad_norm) else None,
                skipped=stats.skipped,
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
        if progress.skipped_in_a_row >= config.optim.max_skipped_steps:
            raise NumericsError(
                f"{progress.skipped_in_a_row} steps in a row up to step {step} had non-finite gradients and were "
                f"skipped; the last blocks were {before} to {progress.position - 1}",
                remedy="lower the learning rate or look at that data; the last checkpoint is from before",
            )
        if hooks.evaluation_due(step):
            hooks.evaluate(step)
    return True


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
