"""Run a plan on this host: forward signals to its ranks and return the run's exit code."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from pathlib import Path
from types import FrameType

from dist_cpt.errors import EXIT_INTERNAL, DistCptError, say
from dist_cpt.run_folder.claim import record_killed
from dist_cpt.run_folder.exit_file import exit_code, stamp
from dist_cpt.runtime.stop import stop_with_parent
from dist_cpt_launch.launch_plan import LaunchPlan

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


def run_local(plan: LaunchPlan) -> int:
    """Run the plan to its end and return the code in exit.json, else the process's own.

    SIGTERM, SIGINT, SIGUSR1 and SIGHUP (unless ignored, as under nohup) ask the ranks to stop at the next step boundary
    and save; a third signal kills them.
    """
    before = stamp(plan.run_folder)
    # In its own session, so that Ctrl-C reaches only this process, which then asks the ranks to stop. If this process
    # is killed, the kernel asks them: a run that nobody watches would keep the folder.
    child = subprocess.Popen(
        plan.argv, env=os.environ | plan.environment, start_new_session=True, preexec_fn=stop_with_parent
    )
    asked = 0

    def forward(signum: int, _frame: FrameType | None) -> None:
        nonlocal asked
        asked += 1
        if asked >= 3:
            ranks = _descendants(child.pid)  # torchrun starts each in its own session
            os.killpg(child.pid, signal.SIGKILL)
            for rank in ranks:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(rank, signal.SIGKILL)
            return
        if asked == 1:
            say("stopping at the next step boundary and saving")
            # torchrun forwards SIGTERM; SIGUSR1 would kill it and orphan its ranks.
            child.send_signal(signal.SIGTERM)
        else:
            say("still saving; the next signal kills the run")

    nohup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    handled = [number for number in FORWARDED if not (nohup and number == signal.SIGHUP)]
    previous = {number: signal.signal(number, forward) for number in handled}
    try:
        code = child.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)  # a lone rank's own children
    code = exit_code(plan.run_folder, before, code)
    if code < 0 or code > 128:
        say(f"the run was killed by a signal (code {code}); it can be resumed")
        code = EXIT_INTERNAL
        with contextlib.suppress(DistCptError):
            record_killed(plan.run_folder, code, "all ranks were killed by a signal")
    return code


def _descendants(process: int) -> list[int]:
    """All descendants of a process. Source: proc(5), /proc/pid/task/tid/children."""
    pids: list[int] = []
    for path in Path(f"/proc/{process}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in map(int, path.read_text().split()):
                pids += [child, *_descendants(child)]
    return pids
