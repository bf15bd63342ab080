"""The seam between a run and what displays or records it; observers read, they never steer."""

from __future__ import annotations

import sys
from typing import Protocol

from dist_cpt.errors import DistCptError
from dist_cpt.run_folder.claim import Claim
from dist_cpt.run_folder.records import CheckpointRecord, EvaluationRecord, RunEnd, RunStart, StepRecord


class Observer(Protocol):
    """Called on rank 0 only."""

    def on_start(self, start: RunStart) -> None: ...
    def on_step(self, record: StepRecord) -> None: ...
    def on_evaluation(self, record: EvaluationRecord) -> None: ...
    def on_checkpoint(self, record: CheckpointRecord) -> None: ...
    def on_message(self, text: str) -> None: ...
    def on_end(self, end: RunEnd) -> None: ...


class Observers:
    """The observers of one attempt on this rank, addressed as one; silent once a later attempt holds the folder."""

    def __init__(self, claim: Claim | None) -> None:
        self._claim = claim  # rank 0's
        self._observers: list[Observer] = []

    def add(self, observer: Observer) -> None:
        """Address `observer` too from now on."""
        self._observers.append(observer)

    def on_start(self, start: RunStart) -> None:
        for observer in self._listening():
            observer.on_start(start)

    def on_step(self, record: StepRecord) -> None:
        for observer in self._listening():
            observer.on_step(record)

    def on_evaluation(self, record: EvaluationRecord) -> None:
        for observer in self._listening():
            observer.on_evaluation(record)

    def on_checkpoint(self, record: CheckpointRecord) -> None:
        for observer in self._listening():
            observer.on_checkpoint(record)

    def on_message(self, text: str) -> None:
        for observer in self._listening():
            observer.on_message(text)

    def on_end(self, end: RunEnd) -> None:
        """Tell every observer, also when one of them fails: a full disk must not hide the reason of the end."""
        for observer in self._listening():
            try:
                observer.on_end(end)
            except DistCptError as error:
                print(f"dist-cpt: {error}", file=sys.stderr, flush=True)

    def _listening(self) -> list[Observer]:
        return [] if self._claim is not None and not self._claim.is_current() else self._observers
