"""What runs on every rank to compare 8-bit moments with fp32 ones."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from tests.contract.cases import running, snapshot
from tests.contract.model import batches, num_tokens
from tests.contract.reference import learning_rates

CYCLE = 4  # steps' worth of blocks that come again and again, so that the loss falls


def memorise(base: str, engine: dict[str, Any], variant: str, steps: int) -> tuple[list[float], dict[str, float]]:
    """Loss per token of every step, in fp32, and the norm of every moment at the end."""
    losses = []
    with running(base, engine, variant, "fp32") as (built, groups):
        for step in range(1, steps + 1):
            data = step % CYCLE
            mine = batches(data, dist.get_rank(), dist.get_world_size())
            for number, batch in enumerate(mine):
                built.accumulate(batch, num_tokens(data), number == len(mine) - 1)
            stats = built.step(learning_rates(groups, step)).read()
            assert not stats.skipped
            losses.append(stats.loss)
        return losses, {key: float(value.norm()) for key, value in snapshot(built).items()}
