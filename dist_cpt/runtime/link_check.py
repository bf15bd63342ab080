"""The nodes of a job together: a matrix product on each rank, an all-reduce over all, send and receive in pairs.

The preflight runs `python -m dist_cpt.runtime.link_check`, one process per GPU (one per node without GPUs), with
torchrun's variables set; a separate process, since a collective that hangs can only be killed. It prints one JSON
object per finished stage, so the last line shows how far it came.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch
import torch.distributed as dist

from dist_cpt.runtime.env import process_env
from dist_cpt.runtime.mesh import init_distributed

REDUCE_BYTES = {"cuda": 256 << 20, "cpu": 4 << 20}
PAIR_BYTES = {"cuda": 64 << 20, "cpu": 4 << 20}
MATRIX = {"cuda": 8192, "cpu": 256}
REPEATS = 5


def main(timeout_seconds: float) -> int:
    """Run all stages on this rank; 0, or 1 if the matrix product is wrong."""
    env = process_env()
    device = init_distributed(env, timeout_seconds)
    header = {"rank": env.rank}
    _print(header | {"stage": "met"})
    seconds, right = _matrix_product(device)
    _print(header | {"stage": "computed", "matmul_seconds": seconds, "matmul_right": right})
    if env.world_size > 1:
        _print(header | {"stage": "reduced", "all_reduce_gb_per_s": _all_reduce(device, env.world_size)})
        if env.local_rank == 0:
            hosts = list(range(0, env.world_size, env.local_world_size))
            _print(header | {"stage": "paired", "pair_gb_per_s": _pairs(device, hosts, env.rank)})
        dist.barrier()
    _print(header | {"stage": "done"})
    return 0 if right else 1


def _matrix_product(device: torch.device) -> tuple[float, bool]:
    """(seconds of the fastest product, whether all are right): ones times the identity are ones."""
    size = MATRIX[device.type]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    left = torch.ones(size, size, dtype=dtype, device=device)
    right = torch.eye(size, dtype=dtype, device=device)
    fastest, correct = float("inf"), True
    for _ in range(REPEATS):
        _sync(device)
        began = time.perf_counter()
        product = left @ right
        _sync(device)
        fastest = min(fastest, time.perf_counter() - began)
        correct = correct and bool((product == 1).all())
    return fastest, correct


def _all_reduce(device: torch.device, ranks: int) -> float:
    """Bus bandwidth in GB/s. Source: nccl-tests, PERFORMANCE.md: 2 (n - 1) / n of the bytes cross each link."""
    values = torch.ones(REDUCE_BYTES[device.type] // 4, dtype=torch.float32, device=device)
    fastest = float("inf")
    for _ in range(1 + REPEATS):  # the first one sets up connections
        values.fill_(1.0)
        _sync(device)
        began = time.perf_counter()
        dist.all_reduce(values)
        _sync(device)
        fastest = min(fastest, time.perf_counter() - began)
    if not bool((values == ranks).all()):
        raise RuntimeError("an all-reduce of ones is not the number of ranks")
    return 2 * (ranks - 1) / ranks * values.numel() * 4 / fastest / 1e9


def _pairs(device: torch.device, ranks: list[int], me: int) -> dict[str, float]:
    """GB/s each way with the neighbours in `ranks`: first the even pairs, then the odd ones.

    A slow node is slow with both of its neighbours; an all-reduce over all nodes cannot single it out.
    """
    mine = ranks.index(me)
    values = torch.ones(PAIR_BYTES[device.type] // 4, dtype=torch.float32, device=device)
    speeds: dict[str, float] = {}
    for first in (0, 1):
        other = mine + 1 if mine % 2 == first else mine - 1
        if not 0 <= other < len(ranks):
            continue
        fastest = float("inf")
        for _ in range(1 + REPEATS):
            _sync(device)
            began = time.perf_counter()
            if mine < other:
                dist.send(values, ranks[other])
                dist.recv(values, ranks[other])
            else:
                dist.recv(values, ranks[other])
                dist.send(values, ranks[other])
            _sync(device)
            fastest = min(fastest, time.perf_counter() - began)
        speeds[str(ranks[other])] = 2 * values.numel() * 4 / fastest / 1e9
    return speeds


def _sync(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _print(values: dict[str, Any]) -> None:
    print(json.dumps(values), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    code = main(float(sys.argv[1]))
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(code)
