"""Run a plan on this host, pass signals on, and return the run's own exit code."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType

from dist_cpt.errors import EXIT_INTERNAL
from dist_cpt.run_folder.exit_file import exit_code, stamp
from dist_cpt_launch.plan import LaunchPlan

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def run_local(plan: LaunchPlan) -> int:
    """Start the plan, wait for it, return its exit code (exit.json first, then the process's own).

    SIGTERM, SIGINT and SIGUSR1 ask the ranks to stop at the next step boundary and save; a third one
    kills them.
    """
    before = stamp(plan.run_folder)
    # Its own session: a Ctrl-C in the terminal reaches this process only, which then asks the ranks.
    child = subprocess.Popen(plan.argv, env=os.environ | plan.environment, start_new_session=True)
    asked = 0

    def forward(signum: int, _frame: FrameType | None) -> None:
        nonlocal asked
        asked += 1
        if asked >= 3:
            ranks = _descendants(child.pid)  # torchrun gives each a session of its own
            os.killpg(child.pid, signal.SIGKILL)
            for rank in ranks:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(rank, signal.SIGKILL)
            return
        if asked == 1:
            print("stopping at the next step boundary and saving", file=sys.stderr, flush=True)
            # torchrun would die of SIGUSR1 and orphan its ranks: SIGTERM is what it passes on.
            child.send_signal(signal.SIGTERM)
        else:
            print("still saving; once more kills the run", file=sys.stderr, flush=True)

    previous = {number: signal.signal(number, forward) for number in FORWARDED}
    try:
        code = child.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)  # a lone rank's own children
    code = exit_code(plan.run_folder, before, code)
    if code < 0 or code > 128:
        print(
            f"the run was ended by a signal (code {code}); it resumes from its last checkpoint",
            file=sys.stderr,
        )
        return EXIT_INTERNAL
    return code


def _descendants(process: int) -> list[int]:
    """All processes below one. Source: proc(5), /proc/pid/task/tid/children."""
    found: list[int] = []
    for path in Path(f"/proc/{process}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in map(int, path.read_text().split()):
                found += [child, *_descendants(child)]
    return found
