"""This process among others, read from what its launcher put into the environment. Torch-free."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from dist_cpt.errors import ConfigError

# Slurm numbers the steps that are no real ones (batch script, external, interactive) from the top of uint32.
_FIRST_SPECIAL_STEP = 2**32 - 16


@dataclass(frozen=True)
class ProcessEnv:
    """Place of this process in the job; `master` is (host, port) where several ranks meet."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    launcher: str  # torchrun | accelerate | deepspeed | environment | srun | alone
    master: tuple[str, int] | None = None


def process_env(environ: Mapping[str, str] = os.environ) -> ProcessEnv:
    """Read torchrun's variables (accelerate and deepspeed set the same), else srun's, else be alone.

    Raises:
        ConfigError: the variables are half set, not integers, or contradict each other.
    """
    if any(key in environ for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK")):
        return _checked(_from_variables(environ))
    if _in_srun_step(environ):
        return _checked(_from_srun(environ))
    return ProcessEnv(0, 0, 1, 1, "alone")


def _from_variables(environ: Mapping[str, str]) -> ProcessEnv:
    missing = [key for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK") if key not in environ]
    if missing:
        present = [key for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK") if key in environ]
        raise ConfigError(
            f"the environment sets {', '.join(present)} but not {', '.join(missing)}",
            remedy="start with torchrun, srun, accelerate or deepspeed, or unset all of them to run alone",
        )
    world_size = _integer(environ, "WORLD_SIZE")
    local_key = "LOCAL_SIZE" if "LOCAL_SIZE" in environ else "LOCAL_WORLD_SIZE"  # deepspeed says LOCAL_SIZE
    return ProcessEnv(
        _integer(environ, "RANK"),
        _integer(environ, "LOCAL_RANK"),
        world_size,
        1 if world_size == 1 else _integer(environ, local_key),
        _launcher(environ),
        _master(environ) if world_size > 1 else None,
    )


def _launcher(environ: Mapping[str, str]) -> str:
    if any(key.startswith("ACCELERATE_") for key in environ):
        return "accelerate"
    if "TORCHELASTIC_RUN_ID" in environ:
        return "torchrun"
    return "deepspeed" if "CROSS_RANK" in environ else "environment"


def _master(environ: Mapping[str, str]) -> tuple[str, int]:
    missing = [key for key in ("MASTER_ADDR", "MASTER_PORT") if not environ.get(key)]
    if missing:
        raise ConfigError(
            f"WORLD_SIZE is {environ['WORLD_SIZE']} but {' and '.join(missing)} not set",
            remedy="set MASTER_ADDR to rank 0's host and MASTER_PORT to a free port there, or use torchrun",
        )
    return environ["MASTER_ADDR"], _integer(environ, "MASTER_PORT")


def _in_srun_step(environ: Mapping[str, str]) -> bool:
    """Whether srun started this process as one of several; a batch script or an interactive shell is alone."""
    if "SLURM_PROCID" not in environ or "SLURM_STEP_ID" not in environ:
        return False
    if _integer(environ, "SLURM_STEP_ID") >= _FIRST_SPECIAL_STEP:
        return False
    return _srun_tasks(environ) > 1


def _srun_tasks(environ: Mapping[str, str]) -> int:
    # SLURM_NTASKS may be the job's number where the step has another.
    return _integer(environ, "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environ else "SLURM_NTASKS")


def _from_srun(environ: Mapping[str, str]) -> ProcessEnv:
    world_size = _srun_tasks(environ)
    return ProcessEnv(
        _integer(environ, "SLURM_PROCID"),
        _integer(environ, "SLURM_LOCALID"),
        world_size,
        _srun_local_tasks(environ, world_size),
        "srun",
        _srun_master(environ),
    )


def _srun_local_tasks(environ: Mapping[str, str], world_size: int) -> int:
    if environ.get("SLURM_STEP_TASKS_PER_NODE") and "SLURM_NODEID" in environ:
        counts = _tasks_per_node(environ["SLURM_STEP_TASKS_PER_NODE"])
        node = _integer(environ, "SLURM_NODEID")
        if node < len(counts):
            return counts[node]
    if "SLURM_NTASKS_PER_NODE" in environ:
        return _integer(environ, "SLURM_NTASKS_PER_NODE")
    raise ConfigError(
        f"srun started {world_size} tasks, but neither SLURM_STEP_TASKS_PER_NODE nor SLURM_NTASKS_PER_NODE "
        "says how many of them are on this node",
        remedy="give srun --ntasks-per-node",
    )


def _tasks_per_node(text: str) -> list[int]:
    """`2(x3),1` -> [2, 2, 2, 1]. Source: sbatch(1), SLURM_TASKS_PER_NODE."""
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise ConfigError(f"SLURM_STEP_TASKS_PER_NODE is {text!r}, expected a form like 2(x3),1")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def _srun_master(environ: Mapping[str, str]) -> tuple[str, int]:
    host = environ.get("MASTER_ADDR") or first_host(environ)
    if environ.get("MASTER_PORT"):
        return host, _integer(environ, "MASTER_PORT")
    # Two steps of one job may overlap, two jobs may share a node, and a start before a requeue may live on somewhere.
    starts = _integer(environ, "SLURM_RESTART_COUNT") if "SLURM_RESTART_COUNT" in environ else 0
    job, step = _integer(environ, "SLURM_JOB_ID"), _integer(environ, "SLURM_STEP_ID")
    return host, 20000 + (job * 7 + step + starts * 1009) % 20000


def first_host(environ: Mapping[str, str]) -> str:
    """First host of a Slurm list such as `gpu[003-007,9],login1`."""
    hosts = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST") or ""
    match = re.match(r"([A-Za-z0-9._-]+)(?:\[(\d+)[^\]]*\]([A-Za-z0-9._-]*))?", hosts)
    if match is None:
        raise ConfigError(
            f"cannot read rank 0's host from SLURM_STEP_NODELIST {hosts!r}",
            remedy="export MASTER_ADDR (rank 0's host) and MASTER_PORT before srun",
        )
    return match[1] + (match[2] or "") + (match[3] or "")


def _integer(environ: Mapping[str, str], key: str) -> int:
    try:
        return int(environ[key])
    except KeyError:
        raise ConfigError(
            f"{key} is not set, though other variables of its launcher are", remedy="start with torchrun or srun"
        ) from None
    except ValueError:
        raise ConfigError(f"{key} is {environ[key]!r}, expected an integer") from None


def _checked(env: ProcessEnv) -> ProcessEnv:
    if not 0 <= env.rank < env.world_size:
        raise ConfigError(f"rank {env.rank} is outside a world of {env.world_size}")
    if not 0 <= env.local_rank < env.local_world_size <= env.world_size:
        raise ConfigError(
            f"local rank {env.local_rank} of {env.local_world_size} on this node does not fit a world of "
            f"{env.world_size}"
        )
    return env
