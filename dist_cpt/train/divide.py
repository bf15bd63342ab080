"""Which rank computes which blocks of a step, so that all have about as much attention to compute.

A document of n tokens costs n^2 / 2 pairs of a query and a key in each layer, so a block of one document costs many
times one of short documents; everything else costs every block the same. Which blocks a step has is decided by the data
order alone. Its loss and gradients are sums over them, so any division computes the same step up to the order of sums.
The division is a pure function of the block borders: every rank finds it by itself.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache

from dist_cpt.config.resolve import StepShape
from dist_cpt.config.schema import RunConfig
from dist_cpt.data.stream_loader import Loader
from dist_cpt.errors import ConfigError
from dist_cpt.plan.families import ATTENTION_LAYERS
from dist_cpt.plan.plan import model_config
from dist_cpt.plan.shapes import shapes_of

_KEPT = 8  # steps: more than are made ahead or in flight

Windows = Mapping[int | None, int]  # number of layers by how many tokens their attention looks back; None: all


class Division:
    """The division of every step of a run over its groups of ranks; one group, or equal blocks: in stream order."""

    def __init__(self, loader: Loader, shape: StepShape, windows: Windows) -> None:
        self._loader, self._shape, self._windows = loader, shape, windows
        self._num_groups = shape.share(0).num_groups
        self._of_step = lru_cache(maxsize=_KEPT)(self._divide)

    def positions(self, start: int, group: int) -> list[list[int]]:
        """Stream positions of each micro-batch that `group` computes of the step that starts at position `start`."""
        return [[start + number for number in forward[group]] for forward in self._of_step(start)[0]]

    def max_over_mean(self, start: int) -> float | None:
        """Attention of the group with the most over the mean, summed over the forwards of a step; None: one group."""
        return self._of_step(start)[1]

    def _divide(self, start: int) -> tuple[list[list[list[int]]], float | None]:
        numbers = range(self._shape.blocks_per_step)
        if self._num_groups == 1:
            return divide([0] * len(numbers), 1, self._shape.micro_batch), None
        costs = [attended(self._loader.document_lengths(start + number), self._windows) for number in numbers]
        forwards = divide(costs, self._num_groups, self._shape.micro_batch)
        return forwards, max_over_mean(costs, forwards) if any(costs) else None  # no layer attends


def layer_windows(config: RunConfig) -> Windows:
    """Of the recipe's model; of one without a table of shapes as if every layer attended to all."""
    try:
        shapes = shapes_of(model_config(config))
    except ConfigError:
        return {None: 1}
    layers = zip(shapes.layer_types, shapes.windows, strict=True)
    return Counter(window for kind, window in layers if kind in (*ATTENTION_LAYERS, "hybrid"))


def attended(lengths: Sequence[int], windows: Windows) -> int:
    """Pairs of a query and a key that causal attention computes in documents of `lengths`, over all layers."""
    pairs = 0
    for window, layers in windows.items():
        for length in lengths:
            seen = length if window is None else min(length, window)
            pairs += layers * (seen * (seen + 1) // 2 + (length - seen) * seen)
    return pairs


def divide(costs: Sequence[int], num_groups: int, micro_batch: int) -> list[list[list[int]]]:
    """Block numbers by forward, group and place in the micro-batch; a multiple of num_groups x micro_batch blocks.

    Ranks meet in every forward, so each is made of blocks of like cost, the costliest first: with one block per
    micro-batch no other division has a lower sum of each forward's maximum. Within a forward the costliest block goes
    to the group that has the least, first in this forward, then in the step.
    """
    per_forward = num_groups * micro_batch
    order = range(len(costs)) if len(set(costs)) == 1 else sorted(range(len(costs)), key=lambda n: (-costs[n], n))
    total = [0] * num_groups
    forwards = []
    for first in range(0, len(costs), per_forward):
        blocks: list[list[int]] = [[] for _ in range(num_groups)]
        free = sorted((0, total[group], group) for group in range(num_groups))  # (in this forward, in the step, group)
        for number in order[first : first + per_forward]:
            here, _, group = heapq.heappop(free)
            blocks[group].append(number)
            total[group] += costs[number]
            if len(blocks[group]) < micro_batch:
                heapq.heappush(free, (here + costs[number], total[group], group))
        forwards.append([sorted(numbers) for numbers in blocks])
    return forwards


def max_over_mean(costs: Sequence[int], forwards: Sequence[Sequence[Sequence[int]]]) -> float:
    """Sum over the forwards of the costliest group's cost, over that of the mean group."""
    by_group = [[sum(costs[number] for number in numbers) for numbers in groups] for groups in forwards]
    most, whole = sum(map(max, by_group)), sum(map(sum, by_group))
    return most * len(by_group[0]) / whole
