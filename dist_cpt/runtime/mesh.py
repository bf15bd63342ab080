"""The process group of a job's ranks."""

from __future__ import annotations

import os
import resource
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from dist_cpt.errors import ConfigError, HangError
from dist_cpt.runtime.env import ProcessEnv
from dist_cpt.runtime.node_address import interface_towards


def init_distributed(env: ProcessEnv, timeout_seconds: float, collective_seconds: float | None = None) -> torch.device:
    """Initialise the process group unless it exists, and return this rank's device.

    NCCL on `cuda:local_rank` if CUDA is available, else gloo on the CPU. A world of one binds no port. The ranks have
    `timeout_seconds` for the rendezvous, then `collective_seconds` (by default the same) for each collective.

    Raises:
        ConfigError: fewer GPUs than local ranks, or a group with another rank or size exists.
        HangError: the rendezvous timed out; the next start may find the port free or the host back.
    """
    device = _device(env)
    raise_file_limit()
    if dist.is_initialized():
        if (dist.get_rank(), dist.get_world_size()) != (env.rank, env.world_size):
            raise ConfigError(
                f"a process group with rank {dist.get_rank()} of {dist.get_world_size()} already exists, "
                f"but this process is rank {env.rank} of {env.world_size}"
            )
        return device
    backend = "nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=collective_seconds or timeout_seconds)
    device_id = device if device.type == "cuda" else None
    if env.world_size == 1:
        dist.init_process_group(
            backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout, device_id=device_id
        )
        return device
    _export(env)
    if env.master is not None and (interface := interface_towards(env.master[0])) is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    try:
        store, rank, world_size = next(rendezvous("env://", timeout=timedelta(seconds=timeout_seconds)))
        store = dist.PrefixStore("default_pg", store)
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=world_size, timeout=timeout, device_id=device_id
        )
    except (dist.DistError, RuntimeError, ValueError) as error:
        raise HangError(
            f"rank {env.rank} could not meet the other {env.world_size - 1} ranks at {env.master} "
            f"within {timeout_seconds:g} s: {str(error).splitlines()[0]}",
            remedy="check that every rank was started and that this host and port are reachable from all nodes",
        ) from error
    return device


def context_group(num_ranks: int) -> dist.ProcessGroup:
    """The group of `num_ranks` neighbouring ranks, 0 to num_ranks - 1 and so on, that this rank is in. Collective."""
    group, _ = dist.new_subgroups(num_ranks)
    assert isinstance(group, dist.ProcessGroup)
    return group


def host_group(device: torch.device, timeout_seconds: float | None = None) -> Any:
    """A gloo group of all ranks beside NCCL's, for what is in host memory; None where the default group is one.

    Collective.
    """
    if device.type != "cuda" or not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    timeout = None if timeout_seconds is None else timedelta(seconds=timeout_seconds)
    return dist.new_group(backend="gloo", timeout=timeout)


def raise_file_limit() -> None:
    """Raise the soft limit of open files, often 1024, to the hard one: a rank has sockets to every other."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def shutdown() -> None:
    """Destroy the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _device(env: ProcessEnv) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if env.local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"local rank {env.local_rank} has no GPU: {torch.cuda.device_count()} are visible on this node",
            remedy="start at most one process per GPU, or set CUDA_VISIBLE_DEVICES='' to train on the CPU",
        )
    device = torch.device("cuda", env.local_rank)
    torch.cuda.set_device(device)
    # Partial sums of a product over tokens, as in every weight gradient, stay in fp32.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    return device


def _export(env: ProcessEnv) -> None:
    """Set the variables that torch.distributed and deepspeed read; srun uses other names."""
    if env.launcher != "srun" or env.master is None:
        return
    values = {
        "RANK": env.rank,
        "LOCAL_RANK": env.local_rank,
        "WORLD_SIZE": env.world_size,
        "LOCAL_WORLD_SIZE": env.local_world_size,
        "MASTER_ADDR": env.master[0],
        "MASTER_PORT": env.master[1],
    }
    os.environ.update({key: str(value) for key, value in values.items()})
