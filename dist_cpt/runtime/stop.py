"""A stop signal becomes a flag that the loop reads at a step boundary. Torch-free.

Saving inside a handler could interrupt a collective or an earlier save; a flag cannot.
"""

from __future__ import annotations

import ctypes
import signal
from types import FrameType
from typing import Any

# Later ones win where ranks were sent different signals.
SIGNALS = ("SIGINT", "SIGUSR1", "SIGTERM")

PR_SET_PDEATHSIG = 1  # Source: prctl(2), Linux


def stop_with_parent() -> None:
    """Let the kernel send SIGTERM when the thread that started this process ends, however it ends.

    Ranks lead sessions of their own and would outlive torchrun's agent if that is killed.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


class StopRequest:
    """Remembers the first of SIGTERM, SIGUSR1 and SIGINT by name; any further one changes nothing.

    A context manager: `with StopRequest() as stop:` installs the handlers and restores the earlier ones.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        self._earlier: dict[int, Any] = {}

    def install(self) -> StopRequest:
        """Take over the signals, also those that the parent left ignored; main thread only."""
        for name in SIGNALS:
            number = signal.Signals[name]
            earlier = signal.signal(number, self._remember)
            self._earlier.setdefault(number, earlier)
        return self

    def restore(self) -> None:
        """Give the signals back to whoever had them before `install`."""
        for number, handler in self._earlier.items():
            # None: a handler that was not set from Python and cannot be set again.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._earlier.clear()

    def __enter__(self) -> StopRequest:
        return self.install()

    def __exit__(self, *_: object) -> None:
        self.restore()

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.requested is None:
            self.requested = signal.Signals(number).name
