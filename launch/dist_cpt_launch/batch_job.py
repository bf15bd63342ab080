"""This batch job as Slurm sees it: its state, the time it has left, its way back into the queue."""

from __future__ import annotations

import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dist_cpt.errors import ConfigError
from dist_cpt_launch.nodes import expand_hosts

COMMAND_SECONDS = 30.0  # for squeue and scontrol
KILLED_SECONDS = 90.0  # Slurm ends a requeued job's script by itself
OVERTAKEN = "OVERTAKEN"


@dataclass(frozen=True)
class Job:
    """This batch job, from Slurm's variables."""

    id: str  # as scontrol and squeue take it: of one task of an array, ARRAY_TASK
    number: str
    task: int | None  # of an array
    nodes: list[str]
    restarts: int

    @staticmethod
    def from_environment(environ: Mapping[str, str] = os.environ) -> Job:
        """The job of this process.

        Raises:
            ConfigError: this is no batch job.
        """
        if "SLURM_JOB_ID" not in environ or "SLURM_JOB_NODELIST" not in environ:
            raise ConfigError("this is no Slurm job", remedy="start it with: sbatch [OPTIONS] train.sbatch RECIPE")
        number, task = environ["SLURM_JOB_ID"], environ.get("SLURM_ARRAY_TASK_ID")
        return Job(
            number if task is None else f"{environ['SLURM_ARRAY_JOB_ID']}_{task}",
            number,
            None if task is None else int(task),
            expand_hosts(environ["SLURM_JOB_NODELIST"]),
            int(environ.get("SLURM_RESTART_COUNT", 0)),
        )

    def state(self) -> str | None:
        """RUNNING, COMPLETING (cancelled, or requeued by Slurm), ...; None if squeue does not answer.

        OVERTAKEN: Slurm gave this node up and started the job elsewhere, while this process lived on.
        """
        words = (said(["squeue", "-h", "-j", self.id, "-O", "State:32,RestartCnt:16"]) or "").split()
        if len(words) == 2 and words[1].isdigit() and int(words[1]) != self.restarts:
            return OVERTAKEN
        return words[0] if words else None

    def seconds_left(self) -> float | None:
        """Until the time limit, infinite if there is none; None if squeue does not answer."""
        if os.environ.get("SLURM_JOB_END_TIME", "").isdigit():
            return int(os.environ["SLURM_JOB_END_TIME"]) - time.time()
        left = said(["squeue", "-h", "-j", self.id, "-o", "%L"]) or ""
        return math.inf if left == "UNLIMITED" else slurm_seconds(left)

    def shown(self) -> dict[str, str]:
        """What scontrol says of the job; empty if it does not answer."""
        return dict(re.findall(r"(\S+?)=(\S*)", said(["scontrol", "-o", "show", "job", self.id]) or ""))

    def requeue(self, bad: set[str]) -> bool:
        """Back into the queue under the same number; Slurm then ends this script."""
        earlier = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it comes at once; the bad nodes are still to be named
        if said(["scontrol", "requeue", self.id]) is None:
            signal.signal(signal.SIGTERM, earlier)
            return False
        self.exclude(bad, self.id)
        time.sleep(KILLED_SECONDS)
        return True

    def exclude(self, bad: set[str], job: str) -> None:
        """Keep a waiting job off bad nodes, if enough others are left."""
        if not bad:
            return
        if not self.can_do_without(bad):
            say(f"bad nodes {', '.join(sorted(bad))} are not excluded: too few others are left for this job")
            return
        earlier = self.shown().get("ExcNodeList", "(null)")
        names = [*([] if earlier in ("(null)", "") else expand_hosts(earlier)), *sorted(bad)]
        if said(["scontrol", "update", f"JobId={job}", f"ExcNodeList={','.join(dict.fromkeys(names))}"]) is not None:
            say(f"job {job} will not run on {', '.join(sorted(bad))}")

    def can_do_without(self, bad: set[str]) -> bool:
        """Whether this job can have as many nodes without the bad ones; True if sinfo does not answer."""
        named = self.shown().get("ReqNodeList", "(null)")
        if named not in ("(null)", "") and bad.intersection(expand_hosts(named)):
            return False  # asked for by name and excluded, it would wait for ever
        listed = said(["sinfo", "-h", "-N", "-p", os.environ.get("SLURM_JOB_PARTITION", ""), "-o", "%N %t"])
        if listed is None:
            return True
        known = [line.split() for line in listed.splitlines()]
        others = {node for node, state in known if node not in bad and not re.match(r"down|drain|fail|unk", state)}
        return len(others) >= len(self.nodes)


def slurm_seconds(text: str) -> float | None:
    """`1-02:03:04`, `02:03:04` or `03:04` in seconds; None for UNLIMITED and the like."""
    match = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text)
    if match is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return 86400.0 * days + 3600 * hours + 60 * minutes + seconds


def said(argv: Sequence[str], environment: Mapping[str, str] | None = None) -> str | None:
    """What a Slurm command answers; None if it is not there, fails or does not answer."""
    if shutil.which(argv[0]) is None:
        return None
    try:
        # fmt: off
        done = subprocess.run(
            argv, env=environment, capture_output=True, text=True, errors="replace",
            timeout=COMMAND_SECONDS, check=False, start_new_session=True,
        )
        # fmt: on
    except (OSError, subprocess.TimeoutExpired) as error:
        say(f"{argv[0]}: {type(error).__name__}")
        return None
    if done.returncode != 0:
        say(f"{argv[0]} failed: {done.stderr.strip() or done.returncode}")
        return None
    return done.stdout.strip()


def say(text: str) -> None:
    """One line into the job's log."""
    print(f"dist-cpt: {time.strftime('%Y-%m-%dT%H:%M:%S')} {text}", file=sys.stderr, flush=True)
