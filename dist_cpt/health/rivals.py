"""Another attempt that may still train in a run folder: whether it lives, and waiting for one that is ending."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from dist_cpt.errors import say
from dist_cpt.health.heartbeats import Heartbeat, process_start, process_state, read_heartbeats
from dist_cpt.health.watchdog import PERIOD_SECONDS, STALE_PERIODS
from dist_cpt.run_folder.claim import Occupied

T = TypeVar("T")

ALIVE_SECONDS = 60.0  # since a rank's last heartbeat; clocks of hosts and file servers differ by less
SIGN_SECONDS = STALE_PERIODS * PERIOD_SECONDS  # in which a living rank writes a heartbeat
NUM_BEATS = 2  # in a row that say nothing about an end: the first may be from before the signal
ENDING_SECONDS = 600.0  # for the save of an attempt that is ending
POLL_SECONDS = 0.25


def living(folder: Path) -> Heartbeat | None:
    """A rank of the newest attempt that lives: its process is here, or its heartbeat changes while we watch.

    Takes SIGN_SECONDS where only a recent heartbeat is left of a rank.
    """
    seen = {beat.rank: beat.time for beat in _recent(folder)}
    until = time.monotonic() + SIGN_SECONDS
    while seen and time.monotonic() < until:
        for beat in _recent(folder):
            here = beat.host == socket.gethostname() and beat.started is not None
            if (here and process_start(beat.pid) == beat.started) or seen.get(beat.rank) != beat.time:
                return beat
        time.sleep(POLL_SECONDS)
    return None


def when_ended(folder: Path, claim: Callable[[], T]) -> T:
    """The result of `claim`, which is called again while an attempt that was told to stop still saves in `folder`.

    Raises:
        Occupied: the other attempt is not ending, or not within ENDING_SECONDS.
    """
    begun, beats, told = time.monotonic(), set[float](), False
    while True:
        try:
            return claim()
        except Occupied as occupied:
            others = read_heartbeats(folder)
            beats |= {beat.time for beat in others if beat.rank == 0}
            ending = any(beat.stopping or beat.ended for beat in others)
            undecided = len(beats) <= NUM_BEATS and time.monotonic() - begun < SIGN_SECONDS
            undecided = undecided and not any(_stopped(beat) for beat in others)
            if not (ending and time.monotonic() - begun < ENDING_SECONDS) and not undecided:
                raise
            if not told:
                told = True
                say(f"{occupied.message}: waiting for its end, if it is ending")
        time.sleep(POLL_SECONDS)


def _recent(folder: Path) -> list[Heartbeat]:
    beats = read_heartbeats(folder)
    return [beat for beat in beats if not beat.ended and abs(time.time() - beat.written) < ALIVE_SECONDS]


def _stopped(beat: Heartbeat) -> bool:
    return (process_state(beat) or "").startswith("stopped")
