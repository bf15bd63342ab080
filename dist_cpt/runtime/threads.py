"""Work on a thread of its own. Torch-free."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


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
