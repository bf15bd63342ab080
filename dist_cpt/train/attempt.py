"""One attempt of a run on this rank: join the others, claim the folder, watch, and record how it ends."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dist_cpt.checkpoint.finished import says_finished
from dist_cpt.checkpoint.retention import remove_staging
from dist_cpt.checkpoint.save import SAVE_POINTS
from dist_cpt.config.resolve import StepShape, run_folder, step_shape
from dist_cpt.config.schema import RunConfig
from dist_cpt.errors import EXIT_DONE, EXIT_INTERNAL, EXIT_STOPPED, DistCptError, Superseded, say
from dist_cpt.health.nccl import save_flight_record, set_nccl_defaults
from dist_cpt.health.rivals import living, when_ended
from dist_cpt.health.watchdog import Watchdog, collective_seconds
from dist_cpt.run_folder.claim import CHANGES, Claim, claim
from dist_cpt.run_folder.names import EXIT, log_file
from dist_cpt.run_folder.records import RunEnd
from dist_cpt.runtime.collectives import on_every_rank, on_rank_zero
from dist_cpt.runtime.env import ProcessEnv, process_env
from dist_cpt.runtime.faults import VARIABLE, Fault, Faults, planned_faults
from dist_cpt.runtime.log import LOGGER, close_log, open_log
from dist_cpt.runtime.mesh import init_distributed, shutdown
from dist_cpt.runtime.node_address import with_address
from dist_cpt.runtime.seed import deterministic
from dist_cpt.runtime.shared_folder import require_shared
from dist_cpt.runtime.stop import StopRequest
from dist_cpt.storage import explained
from dist_cpt.train.observers import Observers
from dist_cpt.train.wandb import new_run_id

RENDEZVOUS_SECONDS = 1800.0
SHARED_FOLDER = (
    "put output_dir on a file system that all nodes share; data.cache_dir, text and base may be local to each"
)
FAULT_POINTS = (
    *("step", "restore", "evaluate"),
    *(f"{kind}.{point}" for kind in ("trial", "save") for point in SAVE_POINTS),
    *(f"change.{change}" for change in CHANGES),  # in the middle of a change of the run folder
)


@dataclass(frozen=True)
class RunContext:
    """What does not change while one attempt lasts."""

    config: RunConfig
    env: ProcessEnv
    folder: Path
    shape: StepShape
    device: torch.device
    claim: Claim
    stop: StopRequest
    fault: Faults
    watchdog: Watchdog
    observers: Observers

    @property
    def attempt(self) -> int:
        """0 for the first start."""
        return self.claim.attempt

    @property
    def wandb_run_id(self) -> str:
        """The same in every attempt."""
        return self.claim.wandb_run_id

    def require_claim(self) -> None:
        """End here, on all ranks, if a later attempt has taken the folder. Collective."""
        on_rank_zero("run folder", self.claim.require_current)

    @property
    def stop_requested(self) -> bool:
        """A signal, or a later attempt that has taken the folder; the fence then names it."""
        return self.stop.requested is not None or (self.env.rank == 0 and not self.claim.is_current())


def run_attempt(
    config: RunConfig,
    stop: StopRequest,
    body: Callable[[RunContext], tuple[int, str]],
    *,
    even_if_finished: bool = True,
) -> tuple[int, Path | None]:
    """Run `body`, which returns (exit code, reason), as one attempt of the run of `config`. Collective.

    Without `even_if_finished` the run is left as it is where nothing is left to do.

    Returns the exit code, and on rank 0 the run folder. Every ending is written to exit.json, except where the
    folder belongs to another recipe or process: then there is no folder to return either.
    """
    env = process_env()
    folder = run_folder(config)
    owns_group = not torch.distributed.is_initialized()
    joined, superseded = False, False
    own_claim: Claim | None = None
    context: RunContext | None = None
    code, reason = EXIT_INTERNAL, ""
    try:
        env = with_address(env)
        shape = step_shape(config, env.world_size)
        if env.world_size > 1:
            set_nccl_defaults(folder)
        device = init_distributed(env, RENDEZVOUS_SECONDS, collective_seconds(config.health.hang))
        joined = True
        faults = on_every_rank(VARIABLE, lambda: planned_faults(FAULT_POINTS))
        if not even_if_finished and on_rank_zero("run folder", lambda: says_finished(config)):
            code = EXIT_DONE
            return code, None
        own_claim = _claim(folder, config)
        with _watched(config, (env, shape, device), own_claim, stop, faults) as context:
            code, reason = body(context)
    except BaseException as raised:
        error = _cause(raised, own_claim)
        superseded = isinstance(error, Superseded)
        code, reason = _say_why(error, env.rank, joined)
        if not isinstance(raised, Exception):  # Ctrl-C, or a library that wants to exit
            raise
    finally:
        if own_claim is not None:
            if env.rank == 0 and not superseded:
                code = _record_end(own_claim, context, code, reason)
            own_claim.close()
        close_log()
        if owns_group and code in (EXIT_DONE, EXIT_STOPPED):
            shutdown()  # after a failure another rank may be inside a collective: leave by the end of the process
    return code, folder if env.rank == 0 and own_claim is not None and own_claim.is_current() else None


@contextlib.contextmanager
def _watched(
    config: RunConfig,
    placed: tuple[ProcessEnv, StepShape, torch.device],
    own_claim: Claim,
    stop: StopRequest,
    faults: Sequence[Fault],
) -> Iterator[RunContext]:
    """The context of an attempt that has its folder, while the log is open and the watchdog watches. Collective."""
    (env, shape, device), folder = placed, own_claim.folder
    require_shared(folder, "output_dir", remedy=SHARED_FOLDER)
    open_log(log_file(folder, env.rank), env.rank)
    fault = Faults(faults, env.rank, own_claim.attempt)
    if fault:
        LOGGER.warning("%s is set: this run will be disturbed on purpose", VARIABLE)
    watchdog = Watchdog(
        folder, env, own_claim.attempt, config.health.hang, lambda reason: save_flight_record(folder, env.rank), stop
    )
    with watchdog, deterministic(config.train.deterministic):
        reached = replace(own_claim, reached=_planned(fault, watchdog))
        yield RunContext(config, env, folder, shape, device, reached, stop, fault, watchdog, Observers(reached))


def _cause(error: BaseException, own_claim: Claim | None) -> BaseException:
    """What ends the attempt: a later one may have moved what this one was reading, and ended the ranks it waits for."""
    if own_claim is None or own_claim.is_current():
        return explained(error)
    try:
        own_claim.require_current()
    except Superseded as superseded:
        superseded.agreed = True  # every rank finds out by itself
        return superseded
    return error


def _say_why(error: BaseException, rank: int, joined: bool) -> tuple[int, str]:
    """Print the error where nobody else does, log a defect with its traceback; returns exit code and reason."""
    if isinstance(error, DistCptError):
        code, reason = error.exit_code, str(error)
        if rank == 0 or (joined and not error.agreed):
            say(f"dist-cpt: {error}")
    else:  # a defect of ours, or a rank that vanished in a collective
        code, reason = EXIT_INTERNAL, f"{type(error).__name__}: {error}".splitlines()[0]
        say(f"dist-cpt: rank {rank}: {reason} -- see logs/rank-{rank}.log")
    if code == EXIT_INTERNAL:
        LOGGER.error("rank %d ends: %s\n%s", rank, reason, traceback.format_exc())
    return code, reason


def _planned(fault: Faults, watchdog: Watchdog) -> Callable[[str], None]:
    return lambda change: fault(f"change.{change}", watchdog.step)


def _claim(folder: Path, config: RunConfig) -> Claim:
    """Rank 0 takes the folder; every rank knows its claim. Collective."""
    taken: list[Claim] = []

    def take() -> list[Any]:
        taken.append(when_ended(folder, lambda: claim(folder, config, new_run_id(), living)))
        remove_staging(folder, before_attempt=taken[0].attempt)
        return [taken[0].attempt, taken[0].wandb_run_id, taken[0].token]

    attempt, run_id, token = on_rank_zero("run folder", take)
    return taken[0] if taken else Claim(folder, attempt, run_id, token)


def _record_end(own_claim: Claim, context: RunContext | None, code: int, reason: str) -> int:
    """Write exit.json, then tell the observers: a display may take a minute to end, and the scheduler kill first.

    Returns the exit code, which is another if a later attempt has the folder by now.
    """
    end = RunEnd(code, reason, 0 if context is None else context.watchdog.step)
    try:
        own_claim = own_claim if context is None else context.claim
        own_claim.write(EXIT, {"code": end.exit_code, "reason": end.reason, "step": end.step})
    except DistCptError as error:
        say(f"dist-cpt: {error}")
        if isinstance(error, Superseded):
            return error.exit_code
    if context is not None:
        context.observers.on_end(end)
    return end.exit_code
