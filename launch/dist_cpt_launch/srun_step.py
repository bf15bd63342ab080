"""One srun inside a batch job: its processes on all nodes, and which of them failed first."""

from __future__ import annotations

import contextlib
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import IO, NamedTuple

from dist_cpt.errors import EXIT_STOPPED, ConfigError
from dist_cpt_launch.slurm_query import log

KILL_SECONDS = 120.0  # for killed ranks to end; a process that waits for a broken device never does
KILLED = 128 + signal.SIGKILL
# How srun reports tasks that end with anything but 0.
_TASK_ENDED = re.compile(r"srun: error: ([A-Za-z0-9._-]+): tasks? ([0-9,-]+): (.*)")
# Ranks that were told to stop; some get the signal when Python has already removed its handlers.
_STOPPED = (f"Exited with exit code {EXIT_STOPPED}", "User defined signal 1")


class Failure(NamedTuple):
    """The first task of a step that failed."""

    node: str
    reason: str


class Step:
    """A running srun. Raises ConfigError if srun is missing."""

    def __init__(self, argv: Sequence[str], environment: dict[str, str]) -> None:
        self.first_failure: Failure | None = None
        self.failed_at = 0.0
        log("starting: " + shlex.join(argv))
        try:
            self._process = subprocess.Popen(argv, env=environment, stderr=subprocess.PIPE)
        except FileNotFoundError:
            raise ConfigError(
                "srun is not installed on the batch host", remedy="make Slurm's commands visible to the job"
            ) from None
        assert self._process.stderr is not None
        self._reader = threading.Thread(target=self._read, args=(self._process.stderr,), daemon=True)
        self._reader.start()

    def wait(self, seconds: float) -> int | None:
        """srun's exit code, the highest of all tasks; None while it runs."""
        try:
            code = self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        self._reader.join(2.0)
        return code

    def first_exit_code(self, otherwise: int) -> int:
        """The exit code of the first task that failed, if known; srun's own may be that of a task it killed."""
        match = re.search(r"exit code (\d+)", self.first_failure.reason) if self.first_failure else None
        return int(match[1]) if match else otherwise

    def ask_to_stop(self) -> None:
        """Send SIGUSR1 to every task on every node, through srun."""
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGUSR1)

    def kill(self, seconds: float = KILL_SECONDS) -> int | None:
        """SIGKILL every task on every node (srun's reaction to SIGTERM); the exit code, None if some task survives."""
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()
        code = self.wait(seconds)
        if code is None:
            self._process.kill()
            self._process.wait()
        return code

    def _read(self, stream: IO[bytes]) -> None:
        with stream:
            for line in stream:
                with contextlib.suppress(OSError):
                    sys.stderr.buffer.write(line)
                    sys.stderr.buffer.flush()
                failure = task_failure(line.decode(errors="replace"))
                if failure is not None and self.first_failure is None:
                    self.first_failure, self.failed_at = failure, time.monotonic()


def task_failure(line: str) -> Failure | None:
    """The failure that a line of srun's stderr reports, if it reports one."""
    match = _TASK_ENDED.match(line)
    if match is None or match[3].startswith(_STOPPED):
        return None
    return Failure(match[1], f"task {match[2]}: {match[3].strip()}")
