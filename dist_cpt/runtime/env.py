"""Rank, world size and rendezvous of this process, read from its launcher's environment variables. Torch-free."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from dist_cpt.errors import ConfigError

# Slurm numbers its special steps (batch script, extern, interactive) from the top of uint32.
_FIRST_SPECIAL_STEP = 2**32 - 16


@dataclass(frozen=True)
class ProcessEnv:
    """This process's place in the job; `master` is the (host, port) of the rendezvous, None for a single rank."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    launcher: str  # torchrun | accelerate | deepspeed | environment | srun | alone
    master: tuple[str, int] | None = None


def process_env(environ: Mapping[str, str] = os.environ) -> ProcessEnv:
    """Read torchrun's variables (accelerate and deepspeed set the same), else srun's; without either a world of one.

    Raises:
        ConfigError: the variables are incomplete, not integers, or contradict each other.
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
    local_key = "LOCAL_SIZE" if "LOCAL_SIZE" in environ else "LOCAL_WORLD_SIZE"  # deepspeed sets LOCAL_SIZE
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
    """Whether srun started this process as one of several tasks; not for a batch script or an interactive shell."""
    if "SLURM_PROCID" not in environ or "SLURM_STEP_ID" not in environ:
        return False
    if _integer(environ, "SLURM_STEP_ID") >= _FIRST_SPECIAL_STEP:
        return False
    return _srun_tasks(environ) > 1


def _srun_tasks(environ: Mapping[str, str]) -> int:
    # SLURM_NTASKS may be the job's task count, which can differ from the step's.
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
        f"srun started {world_size} tasks, but the number on this node is unknown: neither "
        "SLURM_STEP_TASKS_PER_NODE nor SLURM_NTASKS_PER_NODE is set",
        remedy="pass --ntasks-per-node to srun",
    )


def _tasks_per_node(text: str) -> list[int]:
    """`2(x3),1` -> [2, 2, 2, 1]. Source: sbatch(1), SLURM_TASKS_PER_NODE."""
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise ConfigError(f"SLURM_STEP_TASKS_PER_NODE is {text!r}, expected the form 2(x3),1")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def _srun_master(environ: Mapping[str, str]) -> tuple[str, int]:
    hosts = [environ["MASTER_ADDR"]] if environ.get("MASTER_ADDR") else slurm_hosts(environ)
    if not hosts:
        raise ConfigError(
            "rank 0's host is unknown: SLURM_STEP_NODELIST is not set",
            remedy="export MASTER_ADDR (rank 0's host) and MASTER_PORT before srun",
        )
    if environ.get("MASTER_PORT"):
        return hosts[0], _integer(environ, "MASTER_PORT")
    # Steps of one job may overlap, jobs may share a node, and ranks from before a requeue may still be running.
    starts = _integer(environ, "SLURM_RESTART_COUNT") if "SLURM_RESTART_COUNT" in environ else 0
    job, step = _integer(environ, "SLURM_JOB_ID"), _integer(environ, "SLURM_STEP_ID")
    return hosts[0], 20000 + (job * 7 + step + starts * 1009) % 20000


def slurm_hosts(environ: Mapping[str, str]) -> list[str]:
    """All hosts of this Slurm step, else of the job, in order; empty outside of Slurm."""
    hosts = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST")
    return expand_hosts(hosts) if hosts else []


def expand_hosts(text: str) -> list[str]:
    """`gpu[003-005,9],login1` -> gpu003, gpu004, gpu005, gpu9, login1.

    Raises:
        ConfigError: not a Slurm host list.
    """
    items = re.findall(r"(?:[^,\[\]]|\[[0-9,-]+\])+", text)
    hosts = [host for item in items for host in _expand(item)]
    if ",".join(items) != text or not hosts or not all(re.fullmatch(r"[A-Za-z0-9._-]+", host) for host in hosts):
        raise ConfigError(f"{text!r} is not a Slurm host list")
    return hosts


def _expand(item: str) -> list[str]:
    match = re.search(r"\[([0-9,-]+)\]", item)
    if match is None:
        return [item]
    numbers: list[str] = []
    for part in match[1].split(","):
        first, _, last = part.partition("-")
        numbers += [f"{number:0{len(first)}d}" for number in range(int(first), int(last or first) + 1)]
    head, tail = item[: match.start()], item[match.end() :]
    return [host for number in numbers for host in _expand(head + number + tail)]


def _integer(environ: Mapping[str, str], key: str) -> int:
    try:
        return int(environ[key])
    except KeyError:
        raise ConfigError(
            f"{key} is not set, but other variables of its launcher are", remedy="start with torchrun or srun"
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
