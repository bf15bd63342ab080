"""Observers of a run: a display that fails is dropped, the run's own record is not."""

from __future__ import annotations

import pytest

from dist_cpt.errors import WriteError
from dist_cpt.run_folder.records import RunEnd
from dist_cpt.train.observers import Observers


class Recorder:
    """Observer that counts messages and ends, and fails when told to."""

    def __init__(self, error: Exception | None = None) -> None:
        self.messages: list[str] = []
        self.ends: list[RunEnd] = []
        self.error = error

    def on_start(self, start):
        pass

    on_step = on_evaluation = on_checkpoint = on_start

    def on_message(self, text):
        if self.error is not None:
            raise self.error
        self.messages.append(text)

    def on_end(self, end):
        if self.error is not None:
            raise self.error
        self.ends.append(end)


def test_a_display_that_fails_is_dropped_and_noted_once():
    record, display = Recorder(), Recorder(OSError(28, "no space"))
    observers = Observers(None)
    observers.add(record)
    observers.add(display, display=True)
    observers.on_message("one")
    observers.on_message("two")
    assert [text for text in record.messages if text in ("one", "two")] == ["one", "two"]
    assert len([text for text in record.messages if "Recorder" in text]) == 1


def test_an_error_of_the_record_ends_the_run():
    observers = Observers(None)
    observers.add(Recorder(WriteError("full")))
    with pytest.raises(WriteError):
        observers.on_message("one")


def test_every_observer_hears_of_the_end():
    last = Recorder()
    observers = Observers(None)
    observers.add(Recorder(WriteError("full")))
    observers.add(last)
    observers.on_end(RunEnd(0, "done", 3))
    assert [end.step for end in last.ends] == [3]
