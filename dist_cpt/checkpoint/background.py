"""A save on its own thread, beside training."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, wait
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from dist_cpt.checkpoint.save import CheckpointInfo
from dist_cpt.errors import CheckpointError
from dist_cpt.runtime.collectives import over_group, world_size
from dist_cpt.runtime.threads import started


class BackgroundSave:
    """At most one save at a time, over a gloo group that no other thread uses. Its constructor is collective."""

    def __init__(self, timeout_seconds: float) -> None:
        self._group: Any = None
        if world_size() > 1:
            self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_seconds))
        self._save: Future[CheckpointInfo] | None = None

    @property
    def running(self) -> bool:
        """Whether a save was started and not collected yet."""
        return self._save is not None

    @property
    def ended(self) -> bool:
        """Whether this rank's part of it is over, with or without an error."""
        return self._save is not None and self._save.done()

    @property
    def failed(self) -> bool:
        """Whether it is over with an error."""
        return self._save is not None and self._save.done() and self._save.exception() is not None

    def start(self, work: Callable[[], CheckpointInfo]) -> None:
        """Run `work` on the thread; the previous save must have been collected."""
        assert self._save is None, "the previous save was not collected"

        def save() -> CheckpointInfo:
            with over_group(self._group):
                return work()

        self._save = started(save, "save")

    def collect(self, timeout_seconds: float | None = None) -> CheckpointInfo:
        """Wait for the end and return what was saved.

        Raises:
            DistCptError: what the save raised.
            CheckpointError: it did not end in time; this rank publishes nothing of it.
        """
        assert self._save is not None, "no save was started"
        save, self._save = self._save, None
        wait([save], timeout_seconds)
        if not save.done():
            raise CheckpointError("the save in the background failed on another rank and did not end here")
        return save.result()
