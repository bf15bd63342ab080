"""Ranks for tests: a pool of processes with one gloo group that runs many cases.

The processes are forked from a server that has imported the heavy libraries once, so that a pool costs well
under a second after the first. They meet over a file, not over a TCP port, and use one thread each. A rank that
raises ends the case with its traceback; ranks that hang are killed and the case ends with their stacks.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import multiprocessing
import os
import pickle
import shutil
import signal
import tempfile
import time
import traceback
import warnings
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, TextIO

PRELOAD = ("torch", "torch.distributed.fsdp", "transformers.models.llama.modeling_llama", "peft", "deepspeed")
GRACE_SECONDS = 5.0  # for the other ranks, once one has raised
COLLECTIVE_TIMEOUT_SECONDS = 60


class RankError(AssertionError):
    """A case failed on some rank; the message holds that rank's traceback or every rank's stack."""


class RankPool:
    """`world_size` processes with an initialised gloo process group, started at the first `run`."""

    def __init__(self, world_size: int, timeout_seconds: float = 120.0) -> None:
        self.world_size = world_size
        self.timeout_seconds = timeout_seconds
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []
        self._folder: Path | None = None

    def run(self, target: str, **kwargs: Any) -> list[Any]:
        """Call `module:function(**kwargs)` on every rank; the results by rank.

        Raises:
            RankError: a rank raised, died or hung; the pool is restarted for the next case if ranks were lost.
        """
        self._start()
        for pipe in self._pipes:
            pipe.send((target, kwargs))
        answers = self._collect()
        failed = {rank: text for rank, (ok, text) in answers.items() if not ok}
        missing = sorted(set(range(self.world_size)) - set(answers))
        if missing:
            stacks = self._stacks(missing)
            self.close()
            failed |= {rank: f"no answer; killed. {stacks.get(rank, '')}" for rank in missing}
        if failed:
            raise RankError("\n".join(f"--- rank {rank}: {text}" for rank, text in sorted(failed.items())))
        return [answers[rank][1] for rank in range(self.world_size)]

    def close(self) -> None:
        """End the processes; the next `run` starts new ones."""
        for process in self._processes:
            process.kill()
            process.join()
        for pipe in self._pipes:
            pipe.close()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._processes, self._pipes, self._folder = [], [], None

    def _start(self) -> None:
        if self._processes and all(process.is_alive() for process in self._processes):
            return
        self.close()
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(PRELOAD))
        self._folder = Path(tempfile.mkdtemp(prefix="ranks-"))
        for rank in range(self.world_size):
            here, there = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, self.world_size, str(self._folder), there), daemon=True
            )
            process.start()
            there.close()
            self._processes.append(process)
            self._pipes.append(here)

    def _collect(self) -> dict[int, tuple[bool, Any]]:
        """(ok, result or traceback) of every rank that answered in time."""
        answers: dict[int, tuple[bool, Any]] = {}
        deadline = time.monotonic() + self.timeout_seconds
        pending = dict(enumerate(self._pipes))
        while pending:
            ready = wait(list(pending.values()), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for rank in [rank for rank, pipe in pending.items() if pipe in ready]:
                with contextlib.suppress(EOFError, ConnectionResetError):  # it died: reported as missing
                    answers[rank] = pickle.loads(pending[rank].recv_bytes())
                del pending[rank]
                if not answers.get(rank, (False, None))[0]:
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        return answers

    def _stacks(self, ranks: list[int]) -> dict[int, str]:
        assert self._folder is not None
        for rank in ranks:
            if self._processes[rank].is_alive():
                with contextlib.suppress(ProcessLookupError):  # it ended this very moment
                    os.kill(self._processes[rank].pid, signal.SIGUSR1)
        time.sleep(0.5)
        files = {rank: self._folder / f"stack-{rank}.txt" for rank in ranks}
        return {rank: file.read_text() for rank, file in files.items() if file.exists()}


def _serve(rank: int, world_size: int, folder: str, pipe: Connection) -> None:
    stacks = _dump_stacks_on_signal(Path(folder) / f"stack-{rank}.txt")
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    warnings.filterwarnings("error", module="dist_cpt|tests")  # as in the pytest process; others' stay warnings
    store = dist.FileStore(str(Path(folder) / "store"), world_size)
    timeout = timedelta(seconds=COLLECTIVE_TIMEOUT_SECONDS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timeout)
    while True:
        try:
            target, kwargs = pipe.recv()
        except EOFError:
            break
        try:
            module, function = target.split(":")
            answer = (True, getattr(importlib.import_module(module), function)(**kwargs))
        except BaseException:
            answer = (False, traceback.format_exc())
        # Plain pickle: the pipe's own pickler would pass tensors as shared memory that dies with this process.
        pipe.send_bytes(pickle.dumps(answer))
    stacks.close()


def _dump_stacks_on_signal(path: Path) -> TextIO:
    file = path.open("w")
    faulthandler.register(signal.SIGUSR1, file=file, all_threads=True)
    return file
