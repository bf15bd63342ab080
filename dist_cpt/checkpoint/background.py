"""A save on its own thread, beside training."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from dist_cpt.checkpoint.save import CheckpointInfo
from dist_cpt.errors import CheckpointError
from dist_cpt.runtime.collectives import over_group, world_size


class BackgroundSave:
    """At most one save at a time, over a gloo group that no other thread uses. Its constructor is collective."""

    def __init__(self, timeout_seconds: float) -> None:
        self._group: Any = None
        if world_size() > 1:
            self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_seconds))
        self._thread: threading.Thread | None = None
        self._result: CheckpointInfo | None = None
        self._error: BaseException | None = None

    @property
    def running(self) -> bool:
        """Whether a save was started and not collected yet."""
        return self._thread is not None

    @property
    def ended(self) -> bool:
        """Whether this rank's part of it is over, with or without an error."""
        return self._thread is not None and not self._thread.is_alive()

    @property
    def failed(self) -> bool:
        """Whether it is over with an error."""
        return self.ended and self._error is not None

    def start(self, work: Callable[[], CheckpointInfo]) -> None:
        """Run `work` on the thread; the previous save must have been collected."""
        assert self._thread is None, "the previous save was not collected"

        def run() -> None:
            try:
                with over_group(self._group):
                    self._result = work()
            except BaseException as error:  # raised by collect
                self._error = error

        self._result, self._error = None, None
        self._thread = threading.Thread(target=run, name="save", daemon=True)
        self._thread.start()

    def collect(self, timeout_seconds: float | None = None) -> CheckpointInfo:
        """Wait for the end and return what was saved.

        Raises:
            DistCptError: what the save raised.
            CheckpointError: it did not end in time; this rank publishes nothing of it.
        """
        assert self._thread is not None, "no save was started"
        self._thread.join(timeout_seconds)
        alive = self._thread.is_alive()
        self._thread = None
        if alive:
            raise CheckpointError("the save in the background failed on another rank and did not end here")
        if self._error is not None:
            raise self._error
        assert self._result is not None
        return self._result
