"""An observer behind a bounded queue, on a thread of its own: its waiting delays no step."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from typing import Any

from dist_cpt.run_folder.records import CheckpointRecord, EvaluationRecord, RunEnd, RunStart, StepRecord
from dist_cpt.train.observers import Observer

MAX_WAITING = 10_000  # records, of about a kilobyte
STALL_SECONDS = 60.0  # for one record: an observer that needs longer is abandoned when the run ends
END_SECONDS = 100.0  # for its own end


class QueuedObserver:
    """Passes records on to `observer`, in order; those that find the queue full are dropped and counted.

    An observer that stalls is abandoned when the run ends: `abandon` must make it let go of this process. `report`
    receives the number of records that it did not take.

    Raises:
        Exception: from the next method, what the observer raised; it gets no more records.
    """

    def __init__(
        self,
        name: str,
        observer: Observer,
        abandon: Callable[[], object],
        report: Callable[[str], object],
        max_waiting: int = MAX_WAITING,
        stall_seconds: float = STALL_SECONDS,
    ) -> None:
        self._name, self._observer, self._abandon, self._report = name, observer, abandon, report
        self._max_waiting, self._stall_seconds = max_waiting, stall_seconds
        self._waiting: queue.SimpleQueue[tuple[Callable[[Any], object], Any]] = queue.SimpleQueue()
        self._num_given = self._num_dropped = 0  # counted on the caller's thread
        self._num_taken = 0  # on ours
        self._taken_at = time.monotonic()
        self._error: Exception | None = None
        self._at_end = threading.Event()
        self._thread = threading.Thread(target=self._pass_on, name=name, daemon=True)
        self._thread.start()

    def on_start(self, start: RunStart) -> None:
        self._give(self._observer.on_start, start)

    def on_step(self, record: StepRecord) -> None:
        self._give(self._observer.on_step, record)

    def on_evaluation(self, record: EvaluationRecord) -> None:
        self._give(self._observer.on_evaluation, record)

    def on_checkpoint(self, record: CheckpointRecord) -> None:
        self._give(self._observer.on_checkpoint, record)

    def on_message(self, text: str) -> None:
        self._give(self._observer.on_message, text)

    def on_end(self, end: RunEnd) -> None:
        """Let the observer take what waits and come to its own end, as long as it does not stall."""
        self._waiting.put((self._observer.on_end, end))
        while not self._at_end.wait(0.1) and time.monotonic() < self._taken_at + self._stall_seconds:
            pass
        self._thread.join(END_SECONDS if self._at_end.is_set() else 0.0)
        if self._thread.is_alive():
            self._abandon()
        if lost := self._num_dropped + self._num_given - self._num_taken:
            self._report(f"{self._name}: {lost} records were dropped, it took them too slowly; the run folder has all")
        if self._error is not None:
            raise self._error

    def _give(self, take: Callable[[Any], object], record: Any) -> None:
        if self._error is not None:
            raise self._error
        if self._num_given - self._num_taken >= self._max_waiting:
            self._num_dropped += 1
            return
        if self._num_given == self._num_taken:
            self._taken_at = time.monotonic()  # it has not been waiting for us
        self._num_given += 1
        self._waiting.put((take, record))

    def _pass_on(self) -> None:
        try:
            while not self._at_end.is_set():
                take, record = self._waiting.get()
                if isinstance(record, RunEnd):
                    self._at_end.set()
                take(record)
                self._num_taken += not self._at_end.is_set()
                self._taken_at = time.monotonic()
        except Exception as error:  # raised by the next call
            self._error = error
            self._at_end.set()
