"""Stop signals as a flag that the loop reads at a step boundary. Torch-free.

Saving in a signal handler could interrupt a collective or another save.
"""

from __future__ import annotations

import contextlib
import ctypes
import signal
from collections.abc import Iterator
from types import FrameType
from typing import Any

from dist_cpt.errors import Stopped

# Later ones win if ranks received different signals.
SIGNALS = ("SIGINT", "SIGHUP", "SIGUSR1", "SIGTERM")

PR_SET_PDEATHSIG = 1  # Source: prctl(2), Linux
_LIBC = ctypes.CDLL(None)


def stop_with_parent() -> None:
    """Make the kernel send SIGTERM when the thread that started this process ends.

    Ranks run in sessions of their own and would otherwise outlive a torchrun agent that is killed; the agent, or a
    single rank, its launcher. Stays in force when this process becomes another program.
    """
    _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


class StopRequest:
    """The name of the first stop signal received; as a context manager it restores the handlers."""

    def __init__(self) -> None:
        self.requested: str | None = None
        self._earlier: dict[int, Any] = {}

    def install(self) -> StopRequest:
        """Handle the signals, also those that the parent ignored, except SIGHUP under nohup; main thread only."""
        for name in SIGNALS:
            number = signal.Signals[name]
            if name == "SIGHUP" and signal.getsignal(number) is signal.SIG_IGN:
                continue
            earlier = signal.signal(number, self._remember)
            self._earlier.setdefault(number, earlier)
        return self

    def restore(self) -> None:
        """Restore the handlers from before `install`."""
        for number, handler in self._earlier.items():
            # None: the handler was not set from Python and cannot be restored.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._earlier.clear()

    def __enter__(self) -> StopRequest:
        return self.install()

    def __exit__(self, *_: object) -> None:
        self.restore()

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.requested is None:
            self.requested = signal.Signals(number).name


class _Interrupted(BaseException):
    """As KeyboardInterrupt: no `except Exception` on the way, such as around a user's function, takes it."""


@contextlib.contextmanager
def stopped_by_usr1(what: str) -> Iterator[None]:
    """Raise Stopped in the main thread at SIGUSR1, wherever it is, as Ctrl-C raises KeyboardInterrupt.

    For work that leaves nothing half done at any point.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        raise _Interrupted

    earlier = signal.signal(signal.SIGUSR1, stop)
    try:
        yield
    except _Interrupted:
        raise Stopped(f"SIGUSR1: {what}") from None
    finally:
        signal.signal(signal.SIGUSR1, earlier)
