"""Where every rank of a run stands, and whether its process is alive: one small file per rank. Torch-free.

A thread of the rank rewrites the file every few seconds. A fresh file shows that the process runs; what it says
shows whether the main thread moves.
"""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from dist_cpt.run_folder.names import LOGS, heartbeat_file

STACKS_SIGNAL = signal.SIGUSR2  # a rank answers with all its stacks in logs/stack-rank-N.txt

_STATES = {"T": "stopped by a signal", "t": "held by a debugger", "D": "waiting for a device", "Z": "dead", "X": "dead"}


@dataclass(frozen=True)
class Heartbeat:
    """One rank, as of `time`."""

    rank: int
    host: str
    pid: int
    started: int | None  # clock ticks from boot to the start of the process: another one with its pid is not it
    attempt: int
    step: int
    phase: str
    at: str  # file, line and function in which the main thread is
    time: float  # unix seconds, by the clock of the rank's host
    seconds_in_phase: float  # since the main thread last reported a step or a phase
    ended: bool = False  # nobody watches this process any more
    written: float = 0.0  # unix seconds, by the clock of the file system
    network: str = ""  # on a hang: why rank 0's host cannot be reached


def write_heartbeat(folder: Path, beat: Heartbeat) -> None:
    """Replace the rank's file, unless a later attempt already has one there.

    Raises:
        OSError: the file cannot be written; the earlier one is untouched.
    """
    path = heartbeat_file(folder, beat.rank)
    earlier = _read(path)
    if earlier is not None and earlier.attempt > beat.attempt:
        return
    values = asdict(beat)
    values.pop("written")
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(values) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def read_heartbeats(folder: Path, ranks: Iterable[int] | None = None) -> list[Heartbeat]:
    """All ranks, or `ranks`, of the newest attempt in a run folder, by rank; a file that holds none counts as absent.

    With `ranks` only their files are opened: a thousand ranks that read a thousand files each are a burden.
    """
    if ranks is None:
        paths = list((folder / LOGS).glob(heartbeat_file(folder, 0).name.replace("0", "*")))
    else:
        paths = [heartbeat_file(folder, rank) for rank in ranks]
    beats = [beat for path in paths if (beat := _read(path)) is not None]
    newest = max((beat.attempt for beat in beats), default=0)
    return sorted((beat for beat in beats if beat.attempt == newest), key=lambda beat: beat.rank)


def process_start(pid: int) -> int | None:
    """Clock ticks from boot to the start of a process on this host; None if there is none or no /proc."""
    return None if (known := _stat(pid)) is None else known[1]


def process_state(beat: Heartbeat) -> str | None:
    """What the kernel says of the rank's process, in words; None from another host."""
    if beat.host != socket.gethostname() or beat.started is None:
        return None
    known = _stat(beat.pid)
    if known is None or known[1] != beat.started:
        return "dead"
    return _STATES.get(known[0], "running, but none of its other threads gets a turn")


def send_signal(beat: Heartbeat, number: signal.Signals) -> bool:
    """Signal the rank's process if it is on this host and still the one that wrote the file; whether it was sent."""
    if beat.host != socket.gethostname() or beat.started is None or process_start(beat.pid) != beat.started:
        return False
    try:
        os.kill(beat.pid, number)
    except OSError:  # it ended this moment, or is another user's
        return False
    return True


def request_stacks(folder: Path) -> list[Heartbeat]:
    """Ask every rank of a live run on this host for its stacks (logs/stack-rank-N.txt); those that were asked."""
    return [beat for beat in read_heartbeats(folder) if not beat.ended and send_signal(beat, STACKS_SIGNAL)]


def _read(path: Path) -> Heartbeat | None:
    try:
        with path.open(encoding="utf-8") as file:
            written = os.fstat(file.fileno()).st_mtime
            return replace(Heartbeat(**json.load(file)), written=written)
    except (OSError, ValueError, TypeError):
        return None


def _stat(pid: int) -> tuple[str, int] | None:
    """(state letter, start in clock ticks after boot). Source: proc(5), /proc/pid/stat, fields 3 and 22."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return fields[0], int(fields[19])
    except (OSError, ValueError, IndexError):
        return None
