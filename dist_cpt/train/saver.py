"""When the state is saved, beside training or in its way, and what happens when the disk refuses."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from dist_cpt.checkpoint.background import BackgroundSave
from dist_cpt.checkpoint.save import CheckpointInfo
from dist_cpt.checkpoint.save import save as save_checkpoint
from dist_cpt.config.schema import CheckpointConfig
from dist_cpt.engines.engine import Engine
from dist_cpt.errors import DistCptError, WriteError
from dist_cpt.run_folder.checkpoints import checkpoints_folder, published
from dist_cpt.run_folder.manifest import Identity
from dist_cpt.run_folder.train_state import TrainState
from dist_cpt.runtime.collectives import agree, all_reduce_max_int, broadcast_json, on_rank_zero, rank
from dist_cpt.runtime.log import LOGGER
from dist_cpt.training_state import TensorSpec

GROUP_TIMEOUT_SECONDS = 1800.0  # of one exchange between the ranks' saving threads
ABANDON_SECONDS = 5.0  # for this rank's part of a save that has failed on another one
FIRST_RETRY_SECONDS, LAST_RETRY_SECONDS = 10.0, 300.0
FINAL_TRIES, FINAL_RETRY_SECONDS = 4, 2.0  # at the end and on a stop signal the scheduler does not wait for long


class Saver:
    """Saves one run's state. Every method but `due`, `ended` and `failed` is collective.

    `before` runs on rank 0 ahead of every save and may raise WriteError: what a resume from this checkpoint
    needs elsewhere must be on the disk first. `fence` raises Superseded when a later attempt holds the folder.
    """

    def __init__(
        self,
        folder: Path,
        config: CheckpointConfig,
        engine: Engine,
        specs: Sequence[TensorSpec],
        identity: Identity,
        *,
        adapter: bool,
        sidecars: Sequence[Callable[[Path], object]],
        aliases: Mapping[str, str],
        before: Callable[[], None],
        saved: Callable[[CheckpointInfo, int, float], None],
        fence: Callable[[], object],
        fault: Callable[[str, int], None],
    ) -> None:
        self.saved_step = -1  # of the newest published checkpoint
        self.parent: str | None = None  # its state_sha256
        self._folder = folder
        self._config = config
        self._engine = engine
        self._write = lambda export, state, trial: save_checkpoint(
            folder,
            export,
            specs=specs,
            adapter=adapter,
            state=state,
            identity=identity,
            sidecars=sidecars,
            aliases=aliases,
            keep=config.keep,
            trial=trial,
            fence=fence,
            fault=lambda point: fault(f"{'trial' if trial else 'save'}.{point}", state.step),
        )
        self._before = before
        self._saved = saved
        self._background = BackgroundSave(GROUP_TIMEOUT_SECONDS) if config.asynchronous else None
        self._step_in_background = -1
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
        by_steps = every.every_steps is not None and step % every.every_steps == 0
        return by_steps or (
            every.every_minutes is not None and time.monotonic() - self._last >= 60 * every.every_minutes
        )

    @property
    def ended(self) -> bool:
        """Whether this rank's part of a save in the background is over."""
        return self._background is not None and self._background.ended

    @property
    def failed(self) -> bool:
        """Whether it is over with an error."""
        return self._background is not None and self._background.failed

    def trial(self, state: TrainState) -> None:
        """Save once without publishing, and look whether `keep` checkpoints and one in the making fit.

        Raises:
            WriteError: they do not fit, or the file system refuses.
        """
        info = self._write(self._engine.export_state, state, True)
        on_rank_zero("trial save", lambda: self._require_space(info.num_bytes))
        if rank() == 0:
            LOGGER.info("trial save: %.1f MiB in %.1f s", info.num_bytes / 2**20, info.seconds)

    def save(self, step: int, state: Callable[[], TrainState]) -> None:
        """Save the state after `step`: beside training if the recipe says so, else now.

        A disk that refuses is tried again later, with back-off, until `retry_minutes` after the first refusal.

        Raises:
            WriteError: that time is over.
            NumericsError: a value is not finite.
        """
        begun = time.perf_counter()
        self.finish()  # of the one before: at most one at a time
        if self.saved_step == step:
            return
        self._retry_at = None
        try:
            on_rank_zero("metrics", self._before)
            if self._background is None:
                self._publish(self._write(self._engine.export_state, state(), False), step, begun)
            else:
                content, export = state(), self._engine.snapshot()
                self._background.start(lambda: self._write(export, content, False))
                self._step_in_background = step
                self._stall_seconds = time.perf_counter() - begun
        except WriteError as error:
            self._refused(error)

    def save_now(self, step: int, state: Callable[[], TrainState]) -> None:
        """Save the state after `step` and return when it is published: at the end and on a stop.

        Raises:
            WriteError: the file system refused several times within a few seconds.
        """
        self.finish()
        for number in range(1, FINAL_TRIES + 1):
            if self.saved_step == step:
                return
            begun = time.perf_counter()
            try:
                on_rank_zero("metrics", self._before)
                self._publish(self._write(self._engine.export_state, state(), False), step, begun)
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

    def _publish(self, info: CheckpointInfo, step: int, begun: float) -> None:
        self._saved_at(info, step, time.perf_counter() - begun)

    def _saved_at(self, info: CheckpointInfo, step: int, stall_seconds: float) -> None:
        self.saved_step, self.parent = step, info.state_sha256
        self._last = time.monotonic()
        self._failures, self._retry_at = 0, None
        on_rank_zero("observers", lambda: self._saved(info, step, stall_seconds))

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
            LOGGER.warning("%s; training goes on, next try in %.0f s", error, delay)

    def _require_space(self, num_bytes: int) -> None:
        folder = checkpoints_folder(self._folder)
        places = max(1, self._config.keep + 1 - len(published(self._folder)))
        stat = os.statvfs(folder)
        free = stat.f_bavail * stat.f_frsize
        if free < places * num_bytes:
            raise WriteError(
                f"{folder} has {free / 2**20:.0f} MiB free; {places} more checkpoints of {num_bytes / 2**20:.1f} MiB "
                f"do not fit",
                remedy="free space there, set output_dir to another disk, or lower checkpoint.keep",
            )
