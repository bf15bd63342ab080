"""This batch job: its state in Slurm, the time it has left, and its way back into the queue."""

from __future__ import annotations

import math
import os
import re
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass

from dist_cpt.errors import ConfigError
from dist_cpt.runtime.env import expand_hosts
from dist_cpt_launch.slurm_query import log, query
from dist_cpt_launch.time_limit import slurm_seconds

KILL_WAIT_SECONDS = 90.0  # Slurm kills the script of a requeued job
OVERTAKEN = "OVERTAKEN"


@dataclass(frozen=True)
class Job:
    """This batch job, from Slurm's variables."""

    id: str  # for scontrol and squeue: ARRAY_TASK for a task of an array
    number: str
    task: int | None  # of an array
    nodes: list[str]
    restarts: int

    @staticmethod
    def from_environment(environ: Mapping[str, str] = os.environ) -> Job:
        """The job of this process.

        Raises:
            ConfigError: this process is not in a batch job.
        """
        if "SLURM_JOB_ID" not in environ or "SLURM_JOB_NODELIST" not in environ:
            raise ConfigError("this is not a Slurm job", remedy="start it with: sbatch [OPTIONS] train.sbatch RECIPE")
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

        OVERTAKEN: Slurm gave up this node and restarted the job elsewhere while this process kept running.
        """
        words = (query(["squeue", "-h", "-j", self.id, "-O", "State:32,RestartCnt:16"]) or "").split()
        if len(words) == 2 and words[1].isdigit() and int(words[1]) != self.restarts:
            return OVERTAKEN
        return words[0] if words else None

    def seconds_left(self) -> float | None:
        """Seconds to the time limit, infinite without one; None if squeue does not answer."""
        if os.environ.get("SLURM_JOB_END_TIME", "").isdigit():
            return int(os.environ["SLURM_JOB_END_TIME"]) - time.time()
        left = query(["squeue", "-h", "-j", self.id, "-o", "%L"]) or ""
        return math.inf if left == "UNLIMITED" else slurm_seconds(left)

    def details(self) -> dict[str, str]:
        """The job's fields by scontrol; empty if it does not answer."""
        return dict(re.findall(r"(\S+?)=(\S*)", query(["scontrol", "-o", "show", "job", self.id]) or ""))

    def requeue(self, bad_nodes: set[str]) -> bool:
        """Put the job back into the queue under the same number; on success Slurm kills this script."""
        handler = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it arrives at once, before the nodes are excluded
        if query(["scontrol", "requeue", self.id]) is None:
            signal.signal(signal.SIGTERM, handler)
            return False
        self.exclude(bad_nodes, self.id)
        time.sleep(KILL_WAIT_SECONDS)
        return True

    def exclude(self, bad_nodes: set[str], job: str) -> None:
        """Keep a waiting job off bad nodes if enough others are left."""
        if not bad_nodes:
            return
        names = ", ".join(sorted(bad_nodes))
        if not self.can_run_without(bad_nodes):
            log(f"bad nodes {names} are not excluded: too few others are left for this job")
            return
        excluded = [*_hosts(self.details(), "ExcNodeList"), *sorted(bad_nodes)]
        if (
            query(["scontrol", "update", f"JobId={job}", f"ExcNodeList={','.join(dict.fromkeys(excluded))}"])
            is not None
        ):
            log(f"job {job} will not run on {names}")

    def can_run_without(self, bad_nodes: set[str]) -> bool:
        """Whether enough other nodes exist for this job; True if sinfo does not answer."""
        if bad_nodes.intersection(_hosts(self.details(), "ReqNodeList")):
            return False  # a node that is both required and excluded would keep the job waiting forever
        listed = query(["sinfo", "-h", "-N", "-p", os.environ.get("SLURM_JOB_PARTITION", ""), "-o", "%N %t"])
        if listed is None:
            return True
        states = [line.split() for line in listed.splitlines()]
        up = {node for node, state in states if not re.match(r"down|drain|fail|unk", state)}
        return len(up - bad_nodes) >= len(self.nodes)


def _hosts(details: Mapping[str, str], key: str) -> list[str]:
    listed = details.get(key, "")
    return [] if listed in ("", "(null)") else expand_hosts(listed)
