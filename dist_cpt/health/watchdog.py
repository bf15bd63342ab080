"""Ends a run that no longer makes progress, with the stacks of every rank and the name of the rank at fault."""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import math
import os
import socket
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from io import FileIO
from pathlib import Path
from signal import SIGKILL
from types import TracebackType
from typing import Literal, NamedTuple

from dist_cpt.config.schema import HangConfig
from dist_cpt.errors import EXIT_HANG, EXIT_SUPERSEDED, HangError, WriteError
from dist_cpt.health.culprits import culprits, frozen_ranks
from dist_cpt.health.heartbeats import (
    STACKS_SIGNAL,
    Heartbeat,
    process_start,
    read_heartbeats,
    send_signal,
    write_heartbeat,
)
from dist_cpt.run_folder.exit_file import Hang, hang_reason, replace_hang, superseded, write_first_hang
from dist_cpt.run_folder.names import LOGS, hang_file, heartbeat_file, stack_file
from dist_cpt.runtime.env import ProcessEnv
from dist_cpt.runtime.liveness import listen
from dist_cpt.runtime.log import LOGGER
from dist_cpt.runtime.stop import StopRequest

Phase = Literal["starting", "preparing", "restoring", "training", "saving", "evaluating", "ending"]

PERIOD_SECONDS = 5.0  # between two heartbeats
STALE_PERIODS = 3  # missed heartbeats after which a process counts as frozen
NUM_STEP_TIMES = 64
WITHOUT_WATCHDOG_SECONDS = 1800.0  # of one collective
LONGEST_WAIT_SECONDS = 86400.0  # of a rank for one that makes progress: a download, the hash of a base


def collective_seconds(limits: HangConfig | None) -> float:
    """Timeout of a collective: above every limit of the watchdog, which names the culprit and ends all ranks."""
    if limits is None:
        return WITHOUT_WATCHDOG_SECONDS
    return LONGEST_WAIT_SECONDS + max(limits.min_seconds, limits.other_phase_seconds) + 4 * limits.grace_seconds


def limit_seconds(limits: HangConfig | None, phase: str, step_times: Iterable[float]) -> float:
    """Seconds that a rank may spend in `phase` without progress, given the seconds of its last steps."""
    if limits is None:
        return math.inf
    times = list(step_times)
    if phase != "training" or not times:  # the first step compiles and connects
        return limits.other_phase_seconds
    longest = max(limits.min_seconds, limits.other_phase_seconds)  # what collective_seconds allows for
    return min(max(limits.min_seconds, limits.factor * statistics.median(times)), longest)


class _Position(NamedTuple):
    """Where the main thread is; replaced as a whole, so that reading it takes no lock."""

    phase: str
    step: int
    since: float  # time.monotonic()


class Watchdog:
    """Watches the main thread of one rank: `with Watchdog(...) as watchdog:`, then `watchdog.tick(phase, step)`.

    Between two ticks, pieces of work (`made_progress`) count too, except in training, where a step is the piece and
    saves run beside it. A rank that waits for others has stalled only if they have, too: rank 0 finds out.

    Without `limits` it writes heartbeats and ends nothing. `on_hang` is called with the reason on a thread of its
    own and has `grace_seconds` to finish.

    A thread writes the heartbeat and checks the time. It needs the interpreter lock now and then, so a timer of
    faulthandler, which does not, backs it up: exit code 1, with the stacks, when neither thread has run for the
    limit, the grace and two periods.

    Raises:
        WriteError: the log folder cannot be written.
        HangError: on exit with another error, when a peer has ended the run as hung: the hang caused that error.
    """

    def __init__(
        self,
        folder: Path,
        env: ProcessEnv,
        attempt: int,
        limits: HangConfig | None,
        on_hang: Callable[[str], object] | None = None,
        stop: StopRequest | None = None,
    ) -> None:
        self._folder, self._env, self._attempt = folder, env, attempt
        self._first_rank = env.rank - env.local_rank  # of this node
        self._limits, self._on_hang, self._stop = limits, on_hang, stop
        self._period = PERIOD_SECONDS if limits is None else min(PERIOD_SECONDS, limits.grace_seconds / 2)
        self._step_times: deque[float] = deque(maxlen=NUM_STEP_TIMES)
        self._position = _Position("", 0, 0.0)
        self._last_piece = self._excused_until = 0.0  # time.monotonic()
        self._timer_due = 0.0
        self._network_error = ""
        self._host, self._pid = socket.gethostname(), os.getpid()
        self._main_thread = threading.get_ident()
        self._leave = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        try:
            (folder / LOGS).mkdir(parents=True, exist_ok=True)
            self._hang_file = FileIO(hang_file(folder, env.rank), "a")  # unbuffered: a full disk loses no more
            self._stacks_file = FileIO(stack_file(folder, env.rank), "a")
        except OSError as error:
            raise WriteError(f"{folder / LOGS} cannot be written: {error.strerror}") from error

    @property
    def step(self) -> int:
        """The last step that was reported."""
        return self._position.step

    def __enter__(self) -> Watchdog:
        faulthandler.register(STACKS_SIGNAL, file=self._stacks_file, all_threads=True)
        self.tick("starting", 0)
        listen(self._piece)
        self._beat()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        listen(None)
        self._leave.set()
        self._thread.join()  # forever, if it is just ending the process
        faulthandler.cancel_dump_traceback_later()
        self._beat(ended=True)
        faulthandler.unregister(STACKS_SIGNAL)
        self._hang_file.close()
        self._stacks_file.close()
        if error is not None and (reason := hang_reason(self._folder, self._attempt)) is not None:
            raise HangError(reason) from error

    def tick(self, phase: Phase, step: int) -> None:
        """Report progress of the main thread: it enters `phase`, or has finished `step`."""
        now, before = time.monotonic(), self._position
        if phase == before.phase == "training" and step > before.step:
            self._step_times.append(now - before.since)
        self._position, self._excused_until = _Position(phase, step, now), 0.0
        self._set_timer(now, limit_changed=phase != before.phase or len(self._step_times) == 1)

    def _piece(self) -> None:
        """A piece of work is done, on any thread."""
        if self._position.phase != "training" and not self._leave.is_set():
            self._last_piece = now = time.monotonic()
            self._set_timer(now)

    def _set_timer(self, now: float, *, limit_changed: bool = False) -> None:
        if self._limits is not None and (limit_changed or now >= self._timer_due):
            self._timer_due = now + self._period
            seconds = self._limit(self._position.phase) + self._limits.grace_seconds + 2 * self._period
            faulthandler.dump_traceback_later(seconds, exit=True, file=self._hang_file)

    def _limit(self, phase: str) -> float:
        return limit_seconds(self._limits, phase, self._step_times)

    def _idle_seconds(self) -> float:
        """Since the last tick or piece."""
        return time.monotonic() - max(self._position.since, self._last_piece)

    # -- on the watchdog's thread -----------------------------------------------------------------------------

    def _watch(self) -> None:
        while not self._leave.wait(min(self._period, max(0.05, self._seconds_left()))):
            stalled = self._seconds_left() <= 0 and not self._waits_for_others()
            reason = self._timeout_reason() if stalled else hang_reason(self._folder, self._attempt)
            if reason is not None and self._limits is not None:
                self._end(reason, self._limits.grace_seconds)
            self._beat()

    def _seconds_left(self) -> float:
        left = self._limit(self._position.phase) - self._idle_seconds()
        return max(left, self._excused_until - time.monotonic())

    def _waits_for_others(self) -> bool:
        """Whether some rank makes progress. Rank 0 sees it in all heartbeats; the others leave that to a living rank 0.

        A thousand ranks that read the files of all nodes would load the file server.
        """
        rank, phase = self._env.rank, self._position.phase
        if phase == "training" or self._env.world_size == 1:
            return False
        beats = self._heartbeats(None if rank == 0 else {0, self._first_rank})
        frozen = frozen_ranks(beats, STALE_PERIODS * self._period)
        others = [beat for beat in beats if beat.rank != rank and not beat.ended and beat not in frozen]
        if rank == 0:
            seconds = max((self._limit(phase) - beat.seconds_in_phase for beat in others), default=0.0)
        else:
            seconds = self._period if others else 0.0
        now = time.monotonic()
        self._excused_until = now + seconds
        self._set_timer(now)
        return seconds > 0

    def _timeout_reason(self) -> str:
        position = self._position
        return (
            f"rank {self._env.rank} made no progress for {self._idle_seconds():.0f} s in {position.phase} "
            f"at step {position.step} (limit {self._limit(position.phase):.0f} s)"
        )

    def _end(self, reason: str, grace: float) -> None:
        """Write the stacks, tell the peers, give them `grace` seconds, name the culprits, end this process."""
        try:
            faulthandler.dump_traceback_later(3 * grace, exit=True, file=self._hang_file)  # if a line below blocks
            self._write_stacks(reason)
            if superseded(self._folder, self._attempt):  # it was frozen, perhaps for hours, and others train by now
                LOGGER.warning("a later attempt has claimed %s: this one ends", self._folder)
                os._exit(EXIT_SUPERSEDED)
            is_first = write_first_hang(self._folder, self._hang(reason), self._env.rank)
            if self._on_hang is not None:
                threading.Thread(target=self._on_hang, args=(reason,), daemon=True).start()
            self._network_error = _unreachable(self._env.master, grace / 4)
            self._wait_for_peers(grace)
            beats = self._heartbeats(None if is_first else [self._first_rank])
            frozen = frozen_ranks(beats, STALE_PERIODS * self._period)
            if is_first:
                reason = f"{reason}; {culprits(beats, frozen, self._env.world_size)}"
                replace_hang(self._folder, self._hang(reason), self._env.rank)
            for beat in frozen:
                send_signal(beat, SIGKILL)  # it would block its launcher, and a stopped process reacts to nothing else
            # Only the first rank writes to stderr, the others to their own logs.
            level = logging.ERROR if is_first else logging.INFO
            LOGGER.log(level, "hang: %s -- the stacks are in logs/hang-rank-*.txt", reason)
            self._beat(ended=True)
        except Exception:
            LOGGER.exception("the watchdog of rank %d failed while it reported a hang", self._env.rank)
        finally:
            os._exit(EXIT_HANG)

    def _write_stacks(self, reason: str) -> None:
        position = self._position
        header = (
            f"--- {datetime.now(UTC).isoformat(timespec='seconds')} rank {self._env.rank} host {self._host} "
            f"pid {self._pid} step {position.step} phase {position.phase}, "
            f"{self._idle_seconds():.1f} s without progress: {reason}\n"
        )
        try:
            self._hang_file.write(header.encode())
            faulthandler.dump_traceback(file=self._hang_file, all_threads=True)
        except OSError:
            print(header, file=sys.stderr, flush=True)
            faulthandler.dump_traceback(all_threads=True)

    def _wait_for_peers(self, seconds: float) -> None:
        """Let the peers write their stacks; a signal reaches even one that holds the interpreter lock."""
        deadline, asked = time.monotonic() + seconds, set[int]()
        while (left := deadline - time.monotonic()) > 0:
            self._beat()
            for beat in frozen_ranks(self._heartbeats([self._first_rank]), STALE_PERIODS * self._period):
                if beat.rank not in asked:
                    asked.add(beat.rank)
                    send_signal(beat, STACKS_SIGNAL)
            time.sleep(min(left, self._period))
        self._beat()

    def _hang(self, reason: str) -> Hang:
        return Hang(reason, self._position.step, self._attempt)

    def _heartbeats(self, first_ranks: Iterable[int] | None) -> list[Heartbeat]:
        return [beat for beat in read_heartbeats(self._folder, first_ranks) if beat.attempt == self._attempt]

    def _beat(self, *, ended: bool = False) -> None:
        position = self._position
        beat = Heartbeat(
            self._env.rank,
            self._host,
            self._pid,
            process_start(self._pid),
            attempt=self._attempt,
            step=position.step,
            phase=position.phase,
            at=_current_line(self._main_thread),
            time=time.time(),
            seconds_in_phase=round(self._idle_seconds(), 3),
            ended=ended,
            stopping=(self._stop and self._stop.requested) or "",
            network=self._network_error,
            local_rank=self._env.local_rank,
        )
        try:
            write_heartbeat(self._folder, beat)
        except OSError:  # a full disk still takes a new date, which shows that this process is alive
            with contextlib.suppress(OSError):
                os.utime(heartbeat_file(self._folder, self._first_rank))


def _current_line(thread: int) -> str:
    """File, line and function that a thread is executing."""
    frame = sys._current_frames().get(thread)
    return "" if frame is None else f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {frame.f_code.co_name}"


def _unreachable(master: tuple[str, int] | None, seconds: float) -> str:
    """Why the rendezvous host cannot be reached any more; empty if it can."""
    if master is None:
        return ""
    try:
        socket.create_connection(master, timeout=seconds).close()
    except ConnectionRefusedError:  # its process has ended, its host answers
        return ""
    except OSError as error:
        return f"cannot reach {master[0]}:{master[1]} ({error.strerror or error})"
    return ""
