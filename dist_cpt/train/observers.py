"""The seam between a run and what displays or records it; observers read, they never steer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from dist_cpt.errors import DistCptError, Superseded, say
from dist_cpt.run_folder.claim import Claim
from dist_cpt.run_folder.records import CheckpointRecord, EvaluationRecord, RunEnd, RunStart, StepRecord
from dist_cpt.runtime.log import LOGGER


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
        self._claim = claim
        self._observers: list[Observer] = []
        self._displays: list[Observer] = []  # those whose errors end nothing but themselves

    def add(self, observer: Observer, *, display: bool = False) -> None:
        """Address `observer` too from now on; an error of a `display` drops it and is noted once, never raised."""
        self._observers.append(observer)
        if display:
            self._displays.append(observer)

    def on_start(self, start: RunStart) -> None:
        self._tell(lambda observer: observer.on_start(start))

    def on_step(self, record: StepRecord) -> None:
        self._tell(lambda observer: observer.on_step(record))

    def on_evaluation(self, record: EvaluationRecord) -> None:
        self._tell(lambda observer: observer.on_evaluation(record))

    def on_checkpoint(self, record: CheckpointRecord) -> None:
        self._tell(lambda observer: observer.on_checkpoint(record))

    def on_message(self, text: str) -> None:
        self._tell(lambda observer: observer.on_message(text))

    def on_end(self, end: RunEnd) -> None:
        """Tell every observer, also when one of them fails: a full disk must not hide the reason of the end."""
        for observer in list(self._observers):
            try:
                self._tell(lambda observer: observer.on_end(end), [observer])
            except DistCptError as error:
                say(f"dist-cpt: {error}")

    def _tell(self, call: Callable[[Observer], None], observers: Sequence[Observer] | None = None) -> None:
        if self._claim is not None and self._observers and not self._claim.is_current():
            return
        for observer in list(self._observers if observers is None else observers):
            try:
                call(observer)
            except Superseded:  # noticed by all ranks at the next boundary
                return
            except Exception as error:
                if observer not in self._displays:
                    raise
                self._observers.remove(observer)
                note = f"{type(observer).__name__} is dropped: {type(error).__name__}: {error}"
                LOGGER.warning("%s", note)
                self.on_message(note)
