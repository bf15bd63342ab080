"""Reading a base into a module that an engine shards: one rank reads each unit, and sends the others what they need.

Ranks take turns as readers, each one unit ahead of what is sent, so that a rank has at most two units of the base in
memory beside its own shards. A matrix is read, changed and quantised whole, on one rank, so no bit of a frozen weight
depends on the number of ranks.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from dist_cpt.adapters.quantize import quantisation_state
from dist_cpt.model.base_weights import UnreadBase
from dist_cpt.runtime.collectives import agree, all_reduce_ints, rank, world_size
from dist_cpt.runtime.liveness import made_progress
from dist_cpt.runtime.log import LOGGER

# (path of a parameter, rank that has read it, its whole value there and None elsewhere); called on all ranks in the
# same order
Receive = Callable[[str, int, torch.Tensor | None], None]


def fill(unread: UnreadBase, module: nn.Module, receive: Receive) -> None:
    """Read every placeholder of `module`, hand it to `receive`, and copy the scales of quantised ones. Collective.

    Raises:
        ConfigError: on all ranks, if a weight cannot be read on one.
    """
    units, start, num_bytes = unread.units, time.monotonic(), 0
    scales = dict(quantisation_state(module))
    mine = iter(range(rank(), len(units), world_size()))
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="base") as reader:

        def read_next() -> Future[dict[str, torch.Tensor]] | None:
            number = next(mine, None)
            return None if number is None else reader.submit(unread.read, units[number])

        ahead = read_next()
        for number, paths in enumerate(units):
            owner, values, error = number % world_size(), dict[str, torch.Tensor](), None
            if owner == rank():
                assert ahead is not None
                try:
                    values = ahead.result()
                except Exception as raised:
                    error = raised
                ahead = None if error else read_next()
            agree(error, "load model")
            num_bytes += sum(value.nbytes for value in values.values())
            for path in paths:
                receive(path, owner, values.pop(path, None))
            for name in [name for name in scales if name.rpartition(".")[0] in paths]:
                send_whole(scales[name], owner, values.pop(name, None))
            made_progress()
    gib, seconds = all_reduce_ints([num_bytes])[0] / 2**30, max(time.monotonic() - start, 1e-9)
    LOGGER.info("model.path: %.2f GiB in %.1f s, %.2f GiB/s by %d ranks", gib, seconds, gib / seconds, world_size())


def send_whole(target: torch.Tensor, owner: int, value: torch.Tensor | None) -> None:
    """Set `target` of every rank to the `value` of rank `owner`. Collective."""
    if value is not None:
        target.copy_(value)
    if world_size() > 1:
        dist.broadcast(as_bytes(target), owner)


def send_rows(target: torch.Tensor, rows: Rows, owner: int, value: torch.Tensor | None) -> None:
    """Set `target` of every rank to its rows of the `value` of rank `owner`. Collective."""
    if world_size() == 1:
        assert value is not None
        target.copy_(value)
        return
    received = torch.empty((rows.per_shard, *rows.shape[1:]), dtype=rows.dtype, device=rows.device)
    parts = None
    if value is not None:
        value = value.to(rows.device).contiguous()
        shards = [_padded(part, received) for part in value.split(rows.per_shard)]
        shards += [received] * (max(rows.shard_of_rank) + 1 - len(shards))  # without a row: anything is sent
        parts = [as_bytes(shards[shard]) for shard in rows.shard_of_rank]
    dist.scatter(as_bytes(received), parts, owner)
    target.copy_(received[: len(target)])


@dataclass(frozen=True)
class Rows:
    """How a matrix of `shape` is sharded by rows: the shard of every rank."""

    shape: torch.Size
    dtype: torch.dtype  # in which it is sent
    device: torch.device  # from which, also to a shard in host memory
    shard_of_rank: list[int]

    @property
    def per_shard(self) -> int:
        return -(-self.shape[0] // (max(self.shard_of_rank) + 1))


def _padded(part: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return part if len(part) == len(like) else torch.cat([part, part.new_zeros(len(like) - len(part), *part.shape[1:])])


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """uint8 view of a contiguous tensor: no backend sends every dtype."""
    return tensor.view(-1).view(torch.uint8)
