"""Several processes of one host that take the units of a recipe."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

from dist_cpt.data.unit_work import SourceWork, take_units
from dist_cpt.errors import EXIT_INTERNAL, DistCptError
from dist_cpt.runtime.liveness import made_progress
from dist_cpt.runtime.stop import stop_with_parent
from dist_cpt.storage import explained

POLL_SECONDS = 1.0


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))


def take_with_workers(works: Sequence[SourceWork], num_workers: int, on_poll: Callable[[], object]) -> None:
    """Let new processes take all units that no living process has; `on_poll` is called at once and about every second.

    Raises:
        DistCptError: that of a worker, or that one was killed.
    """
    context = multiprocessing.get_context("spawn")  # a fork would copy locks that threads of the tokenizer hold
    threads = max(1, cores() // num_workers)
    workers: dict[BaseProcess, Connection] = {}
    try:
        for number in range(num_workers):
            receive, send = context.Pipe(duplex=False)
            worker = context.Process(target=_work, args=(works, threads, send), name=f"prepare-{number}", daemon=True)
            _start_deaf(worker)
            send.close()
            workers[worker] = receive
        on_poll()
        while workers:
            wait([worker.sentinel for worker in workers], POLL_SECONDS)
            for worker in [worker for worker in workers if not worker.is_alive()]:
                _require_success(worker, workers.pop(worker))
            on_poll()
    finally:
        for worker in workers:
            worker.kill()  # a unit is committed whole or not at all
            worker.join()


def _start_deaf(worker: BaseProcess) -> None:
    """Start a process that Ctrl-C, which reaches it too, does not interrupt, from its first instruction on."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        worker.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _require_success(worker: BaseProcess, receive: Connection) -> None:
    error = None
    with receive, suppress(EOFError):  # it sent nothing
        error = receive.recv()
    worker.join()
    code = worker.exitcode
    if isinstance(error, BaseException):
        raise error
    if code:
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
        raise DistCptError(
            f"a worker of prepare (process {worker.pid}) {how}",
            remedy="start it again, with fewer --workers if memory ran out: finished units are kept",
        )


def _work(works: Sequence[SourceWork], threads: int, send: Connection) -> None:
    stop_with_parent()
    os.environ["RAYON_NUM_THREADS"] = str(threads)  # of the tokenizer, before it is first used
    try:
        for work in works:
            take_units(work, threads, made_progress)
    except Exception as error:
        known = explained(error)
        send.send(known if isinstance(known, DistCptError | OSError) else _defect(known))
        raise SystemExit(EXIT_INTERNAL) from None


def _defect(error: BaseException) -> DistCptError:
    import traceback

    traceback.print_exception(error)
    return DistCptError(f"a worker of prepare failed: {type(error).__name__}: {error}")
