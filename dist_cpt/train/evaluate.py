"""Held-out loss, summed over tokens and ranks: never a mean of batch means."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from dist_cpt.config.resolve import Share
from dist_cpt.data.batch import Batch
from dist_cpt.data.text_bytes import TextBytes
from dist_cpt.engines.engine import Engine
from dist_cpt.run_folder.records import HeldOut
from dist_cpt.runtime.collectives import all_reduce_floats
from dist_cpt.runtime.liveness import made_progress


def evaluate(
    engine: Engine,
    batch_of: Callable[[Sequence[int]], Batch],
    indices: Sequence[int],
    padding_index: int,
    share: Share,
    *,
    micro_batch: int,
    text_bytes: TextBytes | None = None,
) -> HeldOut:
    """Mean loss over blocks `indices`; collective, every rank runs the same number of forward passes on its `share`.

    `batch_of(indices)` returns the blocks, and an all-padding block for `padding_index`, which fills up the last round.
    `text_bytes` counts the bytes of their text.
    """
    per_round = share.num_groups * micro_batch
    rounds = -(-len(indices) // per_round)
    padded = [*indices, *[padding_index] * (rounds * per_round - len(indices))]
    loss_sum = torch.zeros((), dtype=torch.float64)
    num_tokens = num_bytes = 0
    for number in range(rounds):
        start = number * per_round + share.group * micro_batch
        batch = batch_of(padded[start : start + micro_batch]).cut(share.part, share.num_parts)
        loss_sum += engine.evaluate(batch).double().cpu()
        num_tokens += batch.num_targets
        num_bytes += 0 if text_bytes is None else text_bytes.of_targets(batch)
        made_progress()
    total, count, size = all_reduce_floats([float(loss_sum), float(num_tokens), float(num_bytes)])
    return HeldOut(total / count if count else math.nan, int(count), int(size))
