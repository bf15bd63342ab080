"""One attempt of a run on this rank: claim the folder, hold it while a session trains, end with a code."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dist_cpt.checkpoint.save import SAVE_POINTS
from dist_cpt.config.resolve import run_folder, step_shape
from dist_cpt.config.schema import RunConfig
from dist_cpt.errors import (
    EXIT_DONE,
    EXIT_INTERNAL,
    EXIT_STOPPED,
    DistCptError,
    Superseded,
)
from dist_cpt.health.nccl import save_flight_record, set_nccl_defaults
from dist_cpt.health.watchdog import Watchdog, collective_seconds
from dist_cpt.run_folder.claim import Claim, claim
from dist_cpt.run_folder.exit_file import write_exit
from dist_cpt.run_folder.names import log_file
from dist_cpt.run_folder.records import RunEnd
from dist_cpt.runtime.collectives import on_every_rank, on_rank_zero
from dist_cpt.runtime.env import ProcessEnv, process_env
from dist_cpt.runtime.faults import VARIABLE, Faults, planned_faults
from dist_cpt.runtime.log import LOGGER, close_log, open_log
from dist_cpt.runtime.mesh import init_distributed, shutdown
from dist_cpt.runtime.stop import StopRequest
from dist_cpt.train.loop import Progress
from dist_cpt.train.observers import Observer
from dist_cpt.train.session import Session
from dist_cpt.train.wandb import new_run_id

RENDEZVOUS_SECONDS = 1800.0
FAULT_POINTS = ("step", "restore", *(f"{kind}.{point}" for kind in ("trial", "save") for point in SAVE_POINTS))


def train(config: RunConfig, stop: StopRequest) -> tuple[int, Path | None]:
    """Train, or resume, the run of `config` as one of its ranks. Collective.

    Returns the exit code, and on rank 0 the run folder, for the report. Every ending is written to exit.json,
    except where the folder belongs to another recipe or process: then there is no folder to return either.
    """
    env = process_env()
    folder = run_folder(config)
    held: Claim | None = None
    met, own_group = False, not torch.distributed.is_initialized()
    code, reason, superseded = EXIT_INTERNAL, "", False
    progress = Progress()
    observers: list[Observer] = []
    try:
        shape = step_shape(config, env.world_size)
        if env.world_size > 1:
            set_nccl_defaults(folder)
        device = init_distributed(env, RENDEZVOUS_SECONDS, collective_seconds(config.health.hang))
        met = True
        faults = on_every_rank(VARIABLE, lambda: planned_faults(FAULT_POINTS))
        held, attempt, run_id = _claim(folder, config, env)
        open_log(log_file(folder, env.rank), env.rank)
        fault = Faults(faults, env.rank, attempt)
        if fault:
            LOGGER.warning("%s is set: this run will be disturbed on purpose", VARIABLE)
        limits = config.health.hang
        first = env.rank - env.local_rank
        local = range(first, first + env.local_world_size)
        with Watchdog(
            folder,
            env.rank,
            limits,
            world_size=env.world_size,
            local_ranks=local,
            attempt=attempt,
            master=env.master,
            on_hang=lambda _: save_flight_record(folder, env.rank),
        ) as watchdog:
            pieces = (config, env, folder, shape, device, attempt, run_id, held, stop, fault, watchdog)
            code, reason = Session(*pieces, observers, progress).go()
    except DistCptError as error:
        code, reason = error.exit_code, str(error)
        superseded = isinstance(error, Superseded)
        if code == EXIT_INTERNAL:
            traceback.print_exc()
        if env.rank == 0 or (met and not error.agreed):
            print(f"dist-cpt: {error}", file=sys.stderr, flush=True)
    except Exception as error:  # a defect of ours, or a rank that vanished in a collective
        code, reason = EXIT_INTERNAL, f"{type(error).__name__}: {error}".splitlines()[0]
        LOGGER.error("rank %d ends: %s\n%s", env.rank, reason, traceback.format_exc())
        print(f"dist-cpt: rank {env.rank}: {reason} -- see logs/rank-{env.rank}.log", file=sys.stderr, flush=True)
    finally:
        if held is not None:
            if not superseded and held.is_current():  # else the folder is another attempt's by now
                _end(observers, folder, code, reason, progress.step)
            held.close()
        close_log()
        if own_group and code in (EXIT_DONE, EXIT_STOPPED):
            shutdown()  # after a failure another rank may be inside a collective: leave by the end of the process
    return code, None if held is None else folder


def _claim(folder: Path, config: RunConfig, env: ProcessEnv) -> tuple[Claim | None, int, str]:
    """Rank 0 takes the folder; all learn the attempt's number and the W&B run id."""
    held: list[Claim] = []

    def take() -> list[Any]:
        held.append(claim(folder, config, new_run_id()))
        return [held[0].attempt, held[0].wandb_run_id]

    attempt, run_id = on_rank_zero("run folder", take)
    return (held[0] if held else None), attempt, run_id


def _end(observers: Sequence[Observer], folder: Path, code: int, reason: str, step: int) -> None:
    """Tell everyone how it ended; a full disk must not hide the reason."""
    for observer in observers:
        try:
            observer.on_end(RunEnd(code, reason, step))
        except DistCptError as error:
            print(f"dist-cpt: {error}", file=sys.stderr, flush=True)
    try:
        write_exit(folder, code, reason, step)
    except DistCptError as error:
        print(f"dist-cpt: {error}", file=sys.stderr, flush=True)
