"""Slurm's client commands, and a job's place in the queue."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence

QUERY_SECONDS = 30.0
QUEUE_SECONDS = 3.0  # for squeue and sacct together


def query(
    argv: Sequence[str],
    *,
    environment: Mapping[str, str] | None = None,
    timeout_seconds: float = QUERY_SECONDS,
    quiet: bool = False,
) -> str | None:
    """The output of a Slurm command; None if it is missing, fails or times out, which is logged unless `quiet`.

    The output of squeue for a job that Slurm no longer knows is empty.
    """
    if shutil.which(argv[0]) is None:
        return None
    # fmt: off
    try:
        done = subprocess.run(
            argv, env=environment, capture_output=True, text=True, errors="replace",
            timeout=timeout_seconds, check=False, start_new_session=True,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        problem = f"{argv[0]}: {type(error).__name__}"
    # fmt: on
    else:
        if done.returncode == 0 or (argv[0] == "squeue" and "Invalid job id" in done.stderr):
            return done.stdout.strip()
        problem = f"{argv[0]} failed: {done.stderr.strip() or done.returncode}"
    if not quiet:
        log(problem)
    return None


def queue_state(job: str | None, timeout_seconds: float = QUEUE_SECONDS) -> str:
    """The job's state by squeue, else by sacct, in one line; or why it is unknown."""
    if job is None:
        return "no batch job"
    if not re.fullmatch(r"[0-9]+(_[0-9]+)?", job):
        return f"job {job!r}: not a Slurm job number"
    if shutil.which("squeue") is None:
        return f"job {job}: no squeue on this host"
    deadline = time.monotonic() + timeout_seconds
    queued = query(
        ["squeue", "--noheader", "--jobs", job, "--format=%T|%r|%S|%N"], timeout_seconds=timeout_seconds, quiet=True
    )
    if queued:
        state, reason, start, nodes = (queued.splitlines()[0].split("|") + [""] * 4)[:4]
        details = f" on {nodes}" if nodes else f" ({reason})" + (f", expected start {start}" if start != "N/A" else "")
        return f"job {job}: {state}{details}"
    if queued is None:
        return f"job {job}: squeue does not answer"
    columns = "--format=State,ExitCode"
    command = ["sacct", "--noheader", "--allocations", "--parsable2", "--jobs", job, columns]
    ended = query(command, timeout_seconds=max(deadline - time.monotonic(), 0.1), quiet=True)
    if ended:
        return f"job {job}: {' '.join(ended.splitlines()[-1].split('|'))}, no longer queued"
    return f"job {job}: not in the queue"


def log(text: str) -> None:
    """One line into the job's log."""
    print(f"dist-cpt: {time.strftime('%Y-%m-%dT%H:%M:%S')} {text}", file=sys.stderr, flush=True)
