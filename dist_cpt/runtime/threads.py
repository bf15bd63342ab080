"""Work on a thread of its own. Torch-free."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, wait
from typing import TypeVar

T = TypeVar("T")
_SMALL_BYTES = 4 * 2**20


def started(function: Callable[[], T], name: str = "") -> Future[T]:
    """Run `function` on a new daemon thread: unlike an executor's, it cannot keep a process from ending."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:  # raised where the result is asked for
            future.set_exception(error)

    threading.Thread(target=run, name=name or None, daemon=True).start()
    return future


def one_ahead(works: Iterable[Callable[[], T]]) -> Generator[Future[T]]:
    """The ended futures of `works`, in order, one at a time; the next one runs meanwhile."""
    running: Future[T] | None = None
    try:
        for work in works:
            ended = running
            wait(() if ended is None else [ended])
            running = started(work)
            if ended is not None:
                yield ended
        if running is not None:
            wait([running])
            yield running
    finally:
        wait(() if running is None else [running])  # what it uses may be closed next


def enough_under_way(num_bytes: Sequence[int], few: int) -> bool:
    """Whether no further piece may start beside those: `few`, or up to four times as many of less than 4 MiB."""
    return len(num_bytes) >= few and (len(num_bytes) >= 4 * few or sum(num_bytes) >= few * _SMALL_BYTES)
