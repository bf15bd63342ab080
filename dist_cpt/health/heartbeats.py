"""Heartbeats: one small file per node, in it a line per rank with its step, phase and process. Torch-free.

A thread of each rank rewrites its own line every few seconds, whatever the other ranks do. A recent one shows that the
process runs, the content whether its main thread makes progress.
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

_LINE_BYTES = 1024  # of one rank: fixed, so that every rank replaces its own line

_STATES = {"T": "stopped by a signal", "t": "stopped by a debugger", "D": "waiting for I/O", "Z": "dead", "X": "dead"}


@dataclass(frozen=True)
class Heartbeat:
    """One rank, as of `time`."""

    rank: int
    host: str
    pid: int
    started: int | None  # clock ticks from boot: tells the process from a later one with its pid
    attempt: int
    step: int
    phase: str
    at: str  # file, line and function that the main thread executes
    time: float  # unix seconds, by the clock of the rank's host
    seconds_in_phase: float  # since the rank last reported a step, a phase or a piece of work
    ended: bool = False  # the watchdog of this process has stopped
    written: float = 0.0  # unix seconds, by the clock of the file system
    stopping: str = ""  # the signal that asked this rank to stop
    local_rank: int = 0  # the place of its line in its node's file
    network: str = ""  # on a hang: why rank 0's host cannot be reached


def write_heartbeat(folder: Path, beat: Heartbeat) -> None:
    """Replace the rank's line in the file of its node, unless it belongs to a later attempt.

    Raises:
        OSError: the file cannot be written.
    """
    at = beat.local_rank * _LINE_BYTES
    fd = os.open(heartbeat_file(folder, beat.rank - beat.local_rank), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        earlier = _parsed(os.pread(fd, _LINE_BYTES, at))
        if earlier is None or earlier.attempt <= beat.attempt:
            os.pwrite(fd, _line(beat), at)
    finally:
        os.close(fd)


def read_heartbeats(folder: Path, first_ranks: Iterable[int] | None = None) -> list[Heartbeat]:
    """The heartbeats of the newest attempt in a run folder, by rank; damaged lines count as absent.

    With `first_ranks` only the files of the nodes with these first ranks are opened.
    """
    if first_ranks is None:
        paths = list((folder / LOGS).glob(heartbeat_file(folder, 0).name.replace("0", "*")))
    else:
        paths = [heartbeat_file(folder, rank) for rank in first_ranks]
    beats = [beat for path in paths for beat in _read(path)]
    newest = max((beat.attempt for beat in beats), default=0)
    return sorted((beat for beat in beats if beat.attempt == newest), key=lambda beat: beat.rank)


def process_start(pid: int) -> int | None:
    """Clock ticks from boot to the start of a process on this host; None without the process or without /proc."""
    return None if (stat := _stat(pid)) is None else stat[1]


def process_state(beat: Heartbeat) -> str | None:
    """The state of the rank's process as the kernel reports it, in words; None for another host's."""
    if beat.host != socket.gethostname() or beat.started is None:
        return None
    stat = _stat(beat.pid)
    if stat is None or stat[1] != beat.started:
        return "dead"
    return _STATES.get(stat[0], "running, but one thread never releases the interpreter lock")


def send_signal(beat: Heartbeat, number: signal.Signals) -> bool:
    """Signal the process that wrote the heartbeat, if it is still alive on this host; whether it was sent."""
    if beat.host != socket.gethostname() or beat.started is None or process_start(beat.pid) != beat.started:
        return False
    try:
        os.kill(beat.pid, number)
    except OSError:  # it has just ended, or belongs to another user
        return False
    return True


def _read(path: Path) -> list[Heartbeat]:
    """The lines of the file's newest attempt. Its date is that of the last line written, the others are older by the
    clock of their common host: clocks of different hosts are never compared."""
    try:
        with path.open("rb") as file:
            raw, changed = file.read(), os.fstat(file.fileno()).st_mtime
    except OSError:
        return []
    lines = (raw[start : start + _LINE_BYTES] for start in range(0, len(raw), _LINE_BYTES))
    beats = [beat for line in lines if (beat := _parsed(line)) is not None]
    newest = max((beat.attempt for beat in beats), default=0)
    beats = [beat for beat in beats if beat.attempt == newest]
    last = max((beat.time for beat in beats), default=0.0)
    return [replace(beat, written=changed - (last - beat.time)) for beat in beats]


def _line(beat: Heartbeat) -> bytes:
    """_LINE_BYTES bytes: JSON, blanks, a line feed."""
    values = asdict(beat)
    values.pop("written")
    line = json.dumps(values).encode()
    if len(line) >= _LINE_BYTES:
        line = json.dumps(values | {"at": "", "network": ""}).encode()
    return line.ljust(_LINE_BYTES - 1) + b"\n"


def _parsed(line: bytes) -> Heartbeat | None:
    try:
        return Heartbeat(**json.loads(line))
    except (ValueError, TypeError):  # never written, or damaged
        return None


def _stat(pid: int) -> tuple[str, int] | None:
    """(state letter, start in clock ticks after boot). Source: proc(5), /proc/pid/stat, fields 3 and 22."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return fields[0], int(fields[19])
    except (OSError, ValueError, IndexError):
        return None
