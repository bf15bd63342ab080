"""Is this run still moving, and is what it learns sane?

A rank whose main thread reports no step within its limit leaves all its stacks, says who holds the run up, and
ends with exit code 72; the other ranks see it and do the same. A loss far above the recent ones is a spike, and a
policy says what becomes of its update.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import logging
import math
import os
import socket
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from datetime import UTC, datetime
from io import FileIO
from pathlib import Path
from signal import SIGKILL
from types import TracebackType
from typing import Any, Literal

from dist_cpt.config.schema import HangConfig
from dist_cpt.errors import EXIT_HANG, HangError, WriteError
from dist_cpt.health.culprits import culprits, frozen_ranks
from dist_cpt.health.heartbeats import (
    STACKS_SIGNAL,
    Heartbeat,
    process_start,
    read_heartbeats,
    send_signal,
    write_heartbeat,
)
from dist_cpt.run_folder.json_files import read_object
from dist_cpt.run_folder.names import EXIT, LOGS, RUN, hang_file, heartbeat_file, stack_file
from dist_cpt.runtime.log import LOGGER

Phase = Literal["starting", "training", "saving", "evaluating", "waiting for a save", "ending"]

PERIOD_SECONDS = 5.0  # between two heartbeats
STALE_PERIODS = 3  # so many missed heartbeats are a frozen process
NUM_STEP_TIMES = 64
WITHOUT_WATCHDOG_SECONDS = 1800.0  # of one collective


def collective_seconds(limits: HangConfig | None) -> float:
    """How long a collective may last: longer than any limit of the watchdog, who names the culprit and ends all."""
    if limits is None:
        return WITHOUT_WATCHDOG_SECONDS
    return max(limits.min_seconds, limits.other_phase_seconds) + 4 * limits.grace_seconds + 60.0


class Watchdog:
    """Watches this rank's main thread: `with Watchdog(...) as watchdog:`, then `watchdog.tick(phase, step)`.

    Every rank has one. `limits` None writes heartbeats and ends nothing. `on_hang` gets the reason on a thread of
    its own and has `grace_seconds` to tell others. `local_ranks` are those of this host, by default all. `master`,
    the host and port where the ranks met, is tried on a hang: who cannot reach it has lost the network.

    A thread writes the heartbeat and looks at the clock. It needs the interpreter lock now and then, so a timer
    of faulthandler, which needs none, stands behind it: exit code 1, with the stacks, when neither it nor the main
    thread has got anywhere for the limit, the grace and two periods.

    Raises:
        WriteError: on entry, the log folder cannot be written.
        HangError: on exit with another error, if a peer has ended the run as hung: that error came of it.
    """

    def __init__(
        self,
        folder: Path,
        rank: int,
        limits: HangConfig | None,
        *,
        world_size: int = 1,
        local_ranks: range | None = None,
        attempt: int = 0,
        master: tuple[str, int] | None = None,
        on_hang: Callable[[str], object] | None = None,
    ) -> None:
        self._folder, self._rank, self._limits = folder, rank, limits
        self._ranks, self._attempt, self._on_hang = range(world_size), attempt, on_hang
        self._local_ranks = self._ranks if local_ranks is None else local_ranks
        self._master, self._network = master, ""
        self._period = PERIOD_SECONDS if limits is None else min(PERIOD_SECONDS, limits.grace_seconds / 2)
        self._step_times: deque[float] = deque(maxlen=NUM_STEP_TIMES)
        self._at: tuple[str, int, float] = ("", 0, 0.0)  # phase, step, since when: replaced whole, so no lock
        self._arm_next = 0.0
        self._leave = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        logs = self._folder / LOGS
        try:
            logs.mkdir(parents=True, exist_ok=True)
            self._hang_file = FileIO(hang_file(self._folder, self._rank), "a")  # no buffer: a full disk keeps none
            self._stacks_file = FileIO(stack_file(self._folder, self._rank), "a")
        except OSError as error:
            raise WriteError(f"{logs} cannot be written: {error.strerror}") from error
        faulthandler.register(STACKS_SIGNAL, file=self._stacks_file, all_threads=True)
        self._main = threading.get_ident()
        self._me = (socket.gethostname(), os.getpid(), process_start(os.getpid()))
        self.tick("starting", 0)
        self._beat()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave.set()
        self._thread.join()  # forever, if it is just ending the process
        faulthandler.cancel_dump_traceback_later()
        self._beat(ended=True)
        faulthandler.unregister(STACKS_SIGNAL)
        self._hang_file.close()
        self._stacks_file.close()
        if error is not None and (announced := self._announced()) is not None:
            raise HangError(announced) from error

    def tick(self, phase: Phase, step: int) -> None:
        """Report progress of the main thread: it enters `phase`, or has done another `step`."""
        now = time.monotonic()
        before, earlier, since = self._at
        if phase == before == "training" and step > earlier:
            self._step_times.append(now - since)
        self._at = (phase, step, now)
        limit_changed = phase != before or len(self._step_times) == 1
        if self._limits is not None and (limit_changed or now >= self._arm_next):
            self._arm_next = now + self._period
            seconds = self._limit(phase) + self._limits.grace_seconds + 2 * self._period
            faulthandler.dump_traceback_later(seconds, exit=True, file=self._hang_file)

    def _limit(self, phase: str) -> float:
        """Seconds that may pass without a tick."""
        if self._limits is None:
            return math.inf
        if phase != "training" or not self._step_times:  # the first step compiles and connects
            return self._limits.other_phase_seconds
        longest = max(self._limits.min_seconds, self._limits.other_phase_seconds)
        slow_step = self._limits.factor * statistics.median(list(self._step_times))
        return min(max(self._limits.min_seconds, slow_step), longest)  # the collectives have that limit

    # -- on the thread -------------------------------------------------------------------------------------

    def _watch(self) -> None:
        while not self._leave.wait(min(self._period, max(0.05, self._seconds_left()))):
            reason = self._announced() if self._seconds_left() > 0 else self._own_reason()
            if reason is not None and self._limits is not None:
                self._end(reason, self._limits.grace_seconds)
            self._beat()

    def _seconds_left(self) -> float:
        phase, _, since = self._at
        return self._limit(phase) - (time.monotonic() - since)

    def _own_reason(self) -> str:
        phase, step, since = self._at
        return (
            f"rank {self._rank} made no progress for {time.monotonic() - since:.0f} s in {phase} at step {step} "
            f"(limit {self._limit(phase):.0f} s)"
        )

    def _beat(self, *, ended: bool = False) -> None:
        phase, step, since = self._at
        frame = sys._current_frames().get(self._main)
        place = (
            "" if frame is None else f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {frame.f_code.co_name}"
        )
        beat = Heartbeat(
            self._rank,
            *self._me,
            attempt=self._attempt,
            step=step,
            phase=phase,
            at=place,
            time=time.time(),
            seconds_in_phase=round(time.monotonic() - since, 3),
            ended=ended,
            network=self._network,
        )
        try:
            write_heartbeat(self._folder, beat)
        except OSError:  # a full disk still takes a new date, and the date says that this process lives
            with contextlib.suppress(OSError):
                os.utime(heartbeat_file(self._folder, self._rank))

    def _end(self, reason: str, grace: float) -> None:
        """Leave the stacks, tell the others, wait for them, name the culprits, end this process."""
        try:
            faulthandler.dump_traceback_later(3 * grace, exit=True, file=self._hang_file)  # if any line here blocks
            self._dump(reason)
            first = self._announce(reason)
            if self._on_hang is not None:
                threading.Thread(target=self._on_hang, args=(reason,), daemon=True).start()
            self._network = _unreachable(self._master, grace / 4)
            self._wait(grace)
            beats = self._beats(self._ranks if first else self._local_ranks)
            frozen = frozen_ranks(beats, STALE_PERIODS * self._period)
            if first:
                reason = f"{reason}; {culprits(beats, frozen, len(self._ranks))}"
                with contextlib.suppress(OSError):
                    os.replace(self._write_exit(reason), self._folder / "exit.json")
            for beat in frozen:
                send_signal(beat, SIGKILL)  # it would hold its launcher up, and a stopped process hears nothing else
            # The first rank says it on stderr; the others in their own logs.
            level = logging.ERROR if first else logging.INFO
            LOGGER.log(level, "hang: %s -- the stacks are in logs/hang-rank-*.txt", reason)
            self._beat(ended=True)
        except Exception:
            LOGGER.exception("the watchdog of rank %d could not say all", self._rank)
        finally:
            os._exit(EXIT_HANG)

    def _wait(self, seconds: float) -> None:
        """Let the others leave their stacks; ask those for them that hold the interpreter lock: a signal needs none."""
        until, asked = time.monotonic() + seconds, set[int]()
        while (left := until - time.monotonic()) > 0:
            self._beat()
            for beat in frozen_ranks(self._beats(self._local_ranks), STALE_PERIODS * self._period):
                if beat.rank not in asked:
                    asked.add(beat.rank)
                    send_signal(beat, STACKS_SIGNAL)
            time.sleep(min(left, self._period))
        self._beat()

    def _beats(self, ranks: range) -> list[Heartbeat]:
        return [beat for beat in read_heartbeats(self._folder, ranks) if beat.attempt == self._attempt]

    def _dump(self, reason: str) -> None:
        host, pid, _ = self._me
        phase, step, since = self._at
        header = (
            f"--- {datetime.now(UTC).isoformat(timespec='seconds')} rank {self._rank} host {host} pid {pid} "
            f"step {step} phase {phase}, {time.monotonic() - since:.1f} s without progress: {reason}\n"
        )
        try:
            self._hang_file.write(header.encode())
            faulthandler.dump_traceback(file=self._hang_file, all_threads=True)
        except OSError:
            print(header, file=sys.stderr, flush=True)
            faulthandler.dump_traceback(all_threads=True)

    def _announce(self, reason: str) -> bool:
        """Write exit.json unless this attempt has one; whether this rank was the first."""
        if _read(self._folder / RUN).get("attempts", 0) - 1 > self._attempt:
            return False  # a later attempt holds the folder
        path = self._folder / "exit.json"
        try:
            temporary = self._write_exit(reason)
            try:
                os.link(temporary, path)
            except FileExistsError:
                return False
            except OSError:  # a file system without hard links
                if path.exists():
                    return False
                os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)
        except OSError:
            LOGGER.error("exit.json cannot be written")
        return True

    def _write_exit(self, reason: str) -> Path:
        path = self._folder / f"{EXIT}.rank-{self._rank}.tmp"
        values = {"code": EXIT_HANG, "reason": reason, "step": self._at[1], "attempt": self._attempt}
        path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        return path

    def _announced(self) -> str | None:
        """Why a rank of this attempt has ended the run as hung, if one has."""
        said = _read(self._folder / EXIT)
        if said.get("code") == EXIT_HANG and said.get("attempt") == self._attempt:
            return str(said.get("reason"))
        return None


def _unreachable(master: tuple[str, int] | None, seconds: float) -> str:
    """Why the place where the ranks met cannot be reached any more; empty if it can."""
    if master is None:
        return ""
    try:
        socket.create_connection(master, timeout=seconds).close()
    except ConnectionRefusedError:  # its process has ended, its host answers
        return ""
    except OSError as error:
        return f"cannot reach {master[0]}:{master[1]} ({error.strerror or error})"
    return ""


def _read(path: Path) -> dict[str, Any]:
    """A file of the run folder, or nothing: a file system in trouble must not stop the watchdog."""
    with contextlib.suppress(OSError):
        return read_object(path)
    return {}
