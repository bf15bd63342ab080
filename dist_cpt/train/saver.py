"""When the state is saved, beside training or in its way, and what happens when the file system refuses."""

from __future__ import annotations

import math
import os
import time
from typing import Any

from dist_cpt.checkpoint.background import BackgroundSave
from dist_cpt.checkpoint.save import CheckpointInfo, RunCheckpoints
from dist_cpt.checkpoint.save import save as save_checkpoint
from dist_cpt.engines.engine import Engine
from dist_cpt.errors import DistCptError, NumericsError, WriteError
from dist_cpt.run_folder.checkpoints import checkpoints_folder, published
from dist_cpt.run_folder.evaluations import keeps_best
from dist_cpt.run_folder.metrics import MetricsFile
from dist_cpt.run_folder.records import CheckpointRecord
from dist_cpt.run_folder.train_state import Probe, Randomness, TrainState
from dist_cpt.runtime.collectives import agree, all_reduce_max_int, broadcast_json, gather_json, on_rank_zero, rank
from dist_cpt.runtime.log import LOGGER
from dist_cpt.runtime.seed import first_draws
from dist_cpt.train.attempt import RunContext
from dist_cpt.train.probe import PROBE_BLOCKS, Stream
from dist_cpt.train.progress import Progress

GROUP_TIMEOUT_SECONDS = 1800.0  # of one exchange between the ranks' saving threads
ABANDON_SECONDS = 5.0  # for this rank's part of a save that has failed on another one
FIRST_RETRY_SECONDS, LAST_RETRY_SECONDS = 10.0, 300.0
FINAL_TRIES, FINAL_RETRY_SECONDS = 4, 2.0  # at the end and on a stop signal the scheduler does not wait for long


class Saver:
    """Saves one run's state. Every method but `due`, `ended` and `failed` is collective.

    Rows of `metrics` are on the disk before the checkpoint that covers them is published.
    """

    def __init__(
        self,
        context: RunContext,
        engine: Engine,
        stream: Stream,
        schedule: dict[str, Any],
        metrics: MetricsFile,
        checkpoints: RunCheckpoints,
    ) -> None:
        self.saved_step = -1  # of the newest published checkpoint
        self.parent: str | None = None  # its state_sha256
        self._context, self._config = context, context.config.checkpoint
        self._engine, self._stream, self._schedule = engine, stream, schedule
        self._metrics, self._checkpoints = metrics, checkpoints
        self._background = BackgroundSave(GROUP_TIMEOUT_SECONDS) if self._config.asynchronous else None
        self._step_in_background = -1
        self._requested_step = -1
        self._stall_seconds = 0.0
        self._last = time.monotonic()
        self._failures = 0
        self._first_failure = 0.0
        self._retry_at: float | None = None

    def due(self, step: int) -> bool:
        """Whether rank 0 wants a checkpoint of the state after `step`."""
        if rank() != 0 or step in (0, self.saved_step, self._step_in_background):
            return False
        if self._retry_at is not None:
            return time.monotonic() >= self._retry_at
        every = self._config
        if step == self._requested_step:
            return True
        by_steps = every.every_steps is not None and step % every.every_steps == 0
        return by_steps or (
            every.every_minutes is not None and time.monotonic() - self._last >= 60 * every.every_minutes
        )

    def request(self, step: int) -> None:
        """Save the state after `step` at the next boundary; on rank 0."""
        self._requested_step = step

    @property
    def ended(self) -> bool:
        """Whether this rank's part of a save in the background is over."""
        return self._background is not None and self._background.ended

    @property
    def failed(self) -> bool:
        """Whether it is over with an error."""
        return self._background is not None and self._background.failed

    def resumed_from(self, step: int, state_sha256: str) -> None:
        """Continue after the published checkpoint of `step`."""
        self.saved_step, self.parent = step, state_sha256

    def trial(self, progress: Progress) -> None:
        """Save once without publishing, and check that `keep` checkpoints and one being written fit.

        Raises:
            WriteError: they do not fit, or the file system refuses.
        """
        info = save_checkpoint(self._checkpoints, self._engine.export_state, self.state(progress), trial=True)
        on_rank_zero("trial save", lambda: self._require_space(info.num_bytes))
        if rank() == 0:
            LOGGER.info("trial save: %.1f MiB in %.1f s", info.num_bytes / 2**20, info.seconds)

    def save(self, progress: Progress) -> None:
        """Save the state of `progress`: beside training if the recipe asks for it, else now.

        A refused save is tried again later, with back-off, until `retry_minutes` after the first refusal.

        Raises:
            WriteError: that time is over.
            NumericsError: a value is not finite.
        """
        begun = time.perf_counter()
        self.finish()  # the one before: at most one at a time
        if self.saved_step == progress.step:
            return
        self._retry_at = None
        try:
            on_rank_zero("metrics", self._metrics.sync)
            if self._background is None:
                self._write_now(progress, begun)
            else:
                state, export = self.state(progress), self._engine.snapshot()
                self._background.start(lambda: save_checkpoint(self._checkpoints, export, state))
                self._step_in_background = progress.step
                self._stall_seconds = time.perf_counter() - begun
        except WriteError as error:
            self._refused(error)

    def save_now(self, progress: Progress) -> None:
        """Save the state of `progress` and return when it is published: at the end and on a stop.

        Raises:
            WriteError: the file system refused several times within a few seconds.
        """
        self.finish()
        for number in range(1, FINAL_TRIES + 1):
            if self.saved_step == progress.step:
                return
            begun = time.perf_counter()
            try:
                on_rank_zero("metrics", self._metrics.sync)
                self._write_now(progress, begun)
            except WriteError as error:
                if number == FINAL_TRIES:
                    raise
                LOGGER.warning("%s; trying again", error.message)
                time.sleep(FINAL_RETRY_SECONDS * 2 ** (number - 1))

    def collect(self) -> None:
        """Take the result of the save in the background once all ranks' parts are over, or one has failed.

        Raises:
            as `save`.
        """
        self._collect(ABANDON_SECONDS)

    def finish(self) -> None:
        """Wait for the save in the background, if there is one.

        Raises:
            as `save`.
        """
        if self._background is not None and self._background.running:
            self._collect(None)

    def _collect(self, timeout_seconds: float | None) -> None:
        assert self._background is not None
        begun = time.perf_counter()
        info: CheckpointInfo | None = None
        error: Exception | None = None
        try:
            info = self._background.collect(timeout_seconds)
        except DistCptError as caught:
            error = caught  # any other is a collective that broke: a rank is gone, and nothing can be agreed any more
        if all_reduce_max_int(int(error is not None and not isinstance(error, WriteError))):
            agree(None if isinstance(error, WriteError) else error, "save")
        step, self._step_in_background = self._step_in_background, -1
        try:
            agree(error, "save")
        except WriteError as refused:
            self._refused(refused)
            return
        assert info is not None
        self._saved_at(info, step, self._stall_seconds + time.perf_counter() - begun)

    def state(self, progress: Progress) -> TrainState:
        """What the next checkpoint records beside its tensors. Collective.

        Raises:
            NumericsError: the loss is not finite.
        """
        config, env = self._context.config, self._context.env
        probed = tuple(range(progress.next_position, progress.next_position + PROBE_BLOCKS))
        probe_loss = self._stream.probe_loss(probed)
        if not math.isfinite(probe_loss):
            raise NumericsError(
                f"the loss after step {progress.step} is {probe_loss}: this state is not saved",
                remedy="lower the learning rate; the last checkpoint is from before",
            )
        draws = gather_json(first_draws(config.seed, progress.step + 1, env.rank))
        return TrainState(
            step=progress.step,
            position=progress.position,
            tokens=progress.tokens,
            tokens_by_source={name: counts.tokens for name, counts in progress.counts_by_source.items()},
            blocks_by_source={name: counts.blocks for name, counts in progress.counts_by_source.items()},
            targets_by_source={name: counts.targets for name, counts in progress.counts_by_source.items()},
            skipped_total=progress.skipped_total,
            skipped_in_a_row=progress.skipped_in_a_row,
            random=Randomness(seed=config.seed, step=progress.step, next_draws=tuple(map(tuple, draws))),
            schedule=self._schedule,
            wandb_run_id=self._context.wandb_run_id,
            attempt=self._context.attempt,
            parent=self.parent,
            optimizer_steps=progress.optimizer_steps,
            skipped_windows=progress.skipped_windows,
            bad_since=progress.bad_since,
            recent_losses=progress.spikes.losses,
            spike_limit=progress.spikes.limit if math.isfinite(progress.spikes.limit) else None,
            next_block_ids=tuple(self._stream.next_block_ids(progress)),
            probe=Probe(block_ids=probed, loss=probe_loss),
            stream=self._stream.loader.marks(progress.next_position),
        )

    def _write_now(self, progress: Progress, begun: float) -> None:
        info = save_checkpoint(self._checkpoints, self._engine.export_state, self.state(progress))
        self._saved_at(info, progress.step, time.perf_counter() - begun)

    def _saved_at(self, info: CheckpointInfo, step: int, stall_seconds: float) -> None:
        self.saved_step, self.parent = step, info.state_sha256
        self._last = time.monotonic()
        self._failures, self._retry_at = 0, None
        record = CheckpointRecord(step, info.path.name, info.seconds, info.num_bytes, stall_seconds)
        on_rank_zero("observers", lambda: self._context.observers.on_checkpoint(record))

    def _refused(self, error: WriteError) -> None:
        """Plan the next try, or give up."""
        now = time.monotonic()
        self._first_failure = now if self._failures == 0 else self._first_failure
        self._failures += 1
        limit = 60 * self._config.retry_minutes
        if broadcast_json(now - self._first_failure >= limit if rank() == 0 else None):
            raise WriteError(
                f"{error.message} (refused {self._failures} times in {limit / 60:g} minutes)", remedy=error.remedy
            ) from error
        delay = min(FIRST_RETRY_SECONDS * 2 ** (self._failures - 1), LAST_RETRY_SECONDS, max(limit, 0.1))
        self._retry_at = now + delay
        if rank() == 0:
            LOGGER.warning("%s; training continues, next try in %.0f s", error, delay)

    def _require_space(self, num_bytes: int) -> None:
        folder = checkpoints_folder(self._context.folder)
        best = keeps_best(self._context.config.evaluate)
        kept = self._config.keep + (self._checkpoints.landmark_step is not None) + best
        places = max(1, kept + 1 - len(published(self._context.folder)))
        stat = os.statvfs(folder)
        free = stat.f_bavail * stat.f_frsize
        if free < places * num_bytes:
            raise WriteError(
                f"{folder} has {free / 2**20:.0f} MiB free; {places} more checkpoints of {num_bytes / 2**20:.1f} MiB "
                f"do not fit",
                remedy="free space there, set output_dir to another disk, or lower checkpoint.keep",
            )
