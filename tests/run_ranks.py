"""Whole runs on several ranks, as a launcher would start them: real processes, real rendezvous, real signals.

The processes are forked from a server that has imported the heavy libraries, so that an attempt starts in well
under a second. A rank that ends badly takes the others with it after a grace, as torchrun and srun do.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from tests.errno_layer import SlowReads
from tests.ranks import PRELOAD

SLOW_READS = "TEST_SLOW_READS"  # of an attempt: the arguments of SlowReads, as JSON
MODULES = (*PRELOAD, "dist_cpt.cli", "dist_cpt.train.run", "dist_cpt.engines.zero", "dist_cpt.engines.fsdp2")

JOB = {"SLURM_JOB_ID": "11"}  # every attempt may take over from the one before, as a requeued job does


@contextlib.contextmanager
def with_plan_on_failure(seed: int, plan: Sequence[object], log: Path) -> Iterator[None]:
    """A failure names the seed, the plan, and the end of the ranks' output."""
    try:
        yield
    except (AssertionError, TimeoutError) as error:
        planned = "\n".join(f"{number}: {act}" for number, act in enumerate(plan))
        output = log.read_text()[-3000:] if log.exists() else ""
        raise AssertionError(f"{error}\nseed {seed}, plan:\n{planned}\n{output}") from error


class RunningRanks:
    """The ranks of one attempt; `finish` gives their exit codes."""

    def __init__(
        self,
        recipe: Path,
        ranks: int,
        *overrides: str,
        log: Path,
        of_rank: Mapping[int, Sequence[str]] | None = None,
        folder_of_rank: Mapping[int, Path] | None = None,
        **environment: str,
    ) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(MODULES))
        port = _free_port()
        self.processes: list[Any] = []
        for rank in range(ranks):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
            given = {key: str(value) for key, value in place.items()} | environment
            given |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            own = (of_rank or {}).get(rank, ())  # overrides of one rank alone
            arguments = ["train", str(recipe), *(f"--set={item}" for item in (*overrides, *own))]
            folder = (folder_of_rank or {}).get(rank)
            process = context.Process(target=_rank, args=(arguments, given, str(log), folder))
            process.start()
            self.processes.append(process)

    def send(self, signum: int) -> None:
        """A signal to every rank, as the scheduler sends it."""
        for process in self.processes:
            if process.is_alive():
                os.kill(process.pid, signum)

    def freeze(self, timeout_seconds: float = 60.0) -> None:
        """Wait until a planned fault has frozen some rank, then freeze the others too.

        Raises:
            AssertionError: no rank froze in time, or some rank has ended.
        """
        deadline = time.monotonic() + timeout_seconds
        while not any(process_stopped(process.pid) for process in self.processes):
            ended = [process.exitcode for process in self.processes]
            assert ended == [None] * len(ended), f"no rank froze; exit codes {ended}"
            assert time.monotonic() < deadline, f"no rank froze within {timeout_seconds:g} s"
            time.sleep(0.01)
        self.send(signal.SIGSTOP)
        while not all(process_stopped(process.pid) for process in self.processes):
            time.sleep(0.01)

    def __enter__(self) -> RunningRanks:
        return self

    def __exit__(self, *_: object) -> None:
        """A case that fails leaves no rank behind, frozen or not."""
        self.send(signal.SIGKILL)
        for process in self.processes:
            process.join()

    def finish(self, timeout_seconds: float = 120.0, grace_seconds: float = 1.0) -> list[int]:
        """Exit codes by rank; negative is the signal that ended it.

        Raises:
            TimeoutError: some rank was still alive; all are killed.
        """
        deadline = time.monotonic() + timeout_seconds
        while alive := [p for p in self.processes if p.is_alive()]:
            if any(p.exitcode not in (None, 0, 75) for p in self.processes):
                deadline = min(deadline, time.monotonic() + grace_seconds)
            wait([p.sentinel for p in alive], timeout=0.2)
            if time.monotonic() > deadline:
                failed = any(p.exitcode not in (None, 0, 75) for p in self.processes)
                self.send(signal.SIGKILL)
                for process in self.processes:
                    process.join()
                if not failed:
                    raise TimeoutError(f"{len(alive)} ranks were still alive after {timeout_seconds:g} s")
        for process in self.processes:
            process.join()
        return [process.exitcode for process in self.processes]


def run_ranks(recipe: Path, ranks: int, *overrides: str, log: Path, **environment: str) -> list[int]:
    """One attempt from start to end."""
    return RunningRanks(recipe, ranks, *overrides, log=log, **environment).finish()


def process_stopped(pid: int) -> bool:
    """Whether SIGSTOP holds a process. Source: proc(5), /proc/pid/stat, field 3."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except OSError:  # it has ended
        return False


def _rank(arguments: list[str], environment: dict[str, str], log: str, folder: Path | None) -> None:
    if folder is not None:
        os.chdir(folder)
    os.environ.update({"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"} | environment)
    with open(log, "a", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    import torch

    torch.set_num_threads(1)
    from dist_cpt.cli import main

    sys.argv = ["dist-cpt", *arguments]
    with contextlib.ExitStack() as stack:
        if slow := environment.get(SLOW_READS):
            stack.enter_context(SlowReads(*json.loads(slow)).installed())
        main()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
