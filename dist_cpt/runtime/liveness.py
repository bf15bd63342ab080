"""Progress of long work, piece by piece: a tensor, a block, a chunk of a file, a batch of documents. Torch-free.

Every loop that may run for minutes calls `made_progress` after each piece, on whatever thread it runs. The watchdog
listens, so that slow work is no hang and stalled work is one.
"""

from __future__ import annotations

from collections.abc import Callable


def _nobody() -> None:
    """No watchdog runs."""


_listener: Callable[[], object] = _nobody


def made_progress() -> None:
    """One piece of long work is done."""
    _listener()


def listen(listener: Callable[[], object] | None) -> None:
    """Call `listener` at every piece from now on, in place of the one before; None: nothing is called."""
    global _listener
    _listener = listener or _nobody
