"""Fault injection: DIST_CPT_FAULT simulates the failures of a cluster. Torch-free.

`point[:rankR][:stepN][:attemptA][:action]`, comma-separated, for example `save.written:rank1:step10:kill` or
`step:step57:term`. By default a fault hits every rank and attempt, the first time the point is reached, and the
action is kill. `slow` is permanent: from that step on the point takes 0.2 s longer.
"""

from __future__ import annotations

import errno
import os
import re
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

from dist_cpt.errors import ConfigError

VARIABLE = "DIST_CPT_FAULT"
_SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "usr1": signal.SIGUSR1, "freeze": signal.SIGSTOP}
_SLOW, _SLOW_SECONDS = "slow", 0.2
_ERRORS = {"enospc": errno.ENOSPC, "edquot": errno.EDQUOT, "eio": errno.EIO, "erofs": errno.EROFS}


@dataclass(frozen=True)
class Fault:
    """One planned fault; None matches everything."""

    point: str
    rank: int | None
    step: int | None
    attempt: int | None
    action: str


class Faults:
    """Called at every named point of a run; triggers the faults planned for this rank, each once.

    Raises:
        OSError: a planned enospc, edquot, eio or erofs.
    """

    def __init__(self, planned: Sequence[Fault], rank: int, attempt: int) -> None:
        self._planned = [fault for fault in planned if fault.rank in (None, rank) and fault.attempt in (None, attempt)]

    def __bool__(self) -> bool:
        return bool(self._planned)

    def __call__(self, point: str, step: int) -> None:
        for fault in self._planned:
            if fault.point != point:
                continue
            if fault.action == _SLOW and step >= (fault.step or 0):
                time.sleep(_SLOW_SECONDS)
            elif fault.action != _SLOW and fault.step in (None, step):
                self._planned.remove(fault)
                _act(fault.action)
                return


def planned_faults(points: Sequence[str]) -> list[Fault]:
    """The faults in DIST_CPT_FAULT; `points` are the known points.

    Raises:
        ConfigError: a fault is malformed, or names an unknown point.
    """
    text = os.environ.get(VARIABLE, "")
    return [_parse(item.strip(), points) for item in text.split(",") if item.strip()]


def _parse(item: str, points: Sequence[str]) -> Fault:
    point, *rest = item.split(":")
    if point not in points:
        raise ConfigError(f"{VARIABLE}: unknown point {point!r} in {item!r}", remedy=f"points: {', '.join(points)}")
    numbers: dict[str, int] = {}
    action = "kill"
    for part in rest:
        number = re.fullmatch(r"(rank|step|attempt)(\d+)", part)
        if number:
            numbers[number[1]] = int(number[2])
        elif part in _SIGNALS or part in _ERRORS or part == _SLOW:
            action = part
        else:
            raise ConfigError(
                f"{VARIABLE}: {part!r} in {item!r} is not rankN, stepN, attemptN or an action",
                remedy=f"actions: {', '.join([*_SIGNALS, *_ERRORS, _SLOW])}",
            )
    return Fault(point, numbers.get("rank"), numbers.get("step"), numbers.get("attempt"), action)


def _act(action: str) -> None:
    if action in _SIGNALS:
        # To this thread: a signal to the process could take effect only after this thread has run on.
        signal.pthread_kill(threading.get_ident(), _SIGNALS[action])
    else:
        raise OSError(_ERRORS[action], os.strerror(_ERRORS[action]) + f" (planned by {VARIABLE})")
