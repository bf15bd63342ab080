"""Which source the block at a position of the global stream comes from; weights become exact shares of a cycle."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from dist_cpt.errors import ConfigError

MAX_CYCLE = 100_000
SHARE_TOLERANCE = 1e-4  # relative error of a share, where MAX_CYCLE allows it


class Mixture:
    """A fixed cycle of sources, each spread evenly: `counts[s]` of every `cycle` blocks come from source s.

    For every source and at every prefix of p blocks, |blocks so far - p * counts / cycle| < 1, whatever
    the number of sources; at multiples of the cycle it is 0.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        self.counts = quantise(weights)  # int64 [num_sources]
        self.cycle = int(self.counts.sum())
        self._source = _spread(self.counts.tolist())  # int64 [cycle]
        self._rank = np.empty_like(self._source)  # blocks of the same source earlier in the cycle
        for source, count in enumerate(self.counts.tolist()):
            self._rank[self._source == source] = np.arange(count)

    def __call__(self, positions: np.ndarray | Sequence[int] | int) -> tuple[np.ndarray, np.ndarray]:
        """Source and index within that source, int64 each, of the shape of `positions` (>= 0)."""
        p = np.asarray(positions, dtype=np.int64)
        if p.size and p.min() < 0:
            raise IndexError("positions of the stream start at 0")
        source = self._source[p % self.cycle]
        return source, (p // self.cycle) * self.counts[source] + self._rank[p % self.cycle]


def quantise(weights: Sequence[float]) -> np.ndarray:
    """Blocks of each source in a cycle, int64 [num_sources]: exact where the weights' common denominator allows it.

    Otherwise the shortest cycle within SHARE_TOLERANCE of every share, or the closest one of MAX_CYCLE blocks.

    Raises:
        ConfigError: a weight is not positive, or too small for one block in MAX_CYCLE.
    """
    # repr is the decimal in the recipe: 0.1 is exactly one tenth, not the nearest binary fraction.
    exact = [Fraction(repr(float(w))) for w in weights]
    if not exact or min(exact) <= 0:
        raise ConfigError(f"data.sources: weights must be positive, got {list(weights)}")
    shares = [w / sum(exact) for w in exact]
    cycle = math.lcm(*(share.denominator for share in shares))
    if cycle <= MAX_CYCLE:
        return np.array([int(share * cycle) for share in shares], dtype=np.int64)
    counts = _shortest_within_tolerance(np.array([float(s) for s in shares]))
    if counts is None:
        counts = _largest_remainder(shares, MAX_CYCLE)
    if counts.min() < 1:
        source = int(counts.argmin())
        raise ConfigError(
            f"data.sources: weight {weights[source]:g} is {float(shares[source]):.2g} of the whole",
            remedy=f"a source needs at least one block in {MAX_CYCLE}",
        )
    return counts // math.gcd(*counts.tolist())


def _shortest_within_tolerance(shares: np.ndarray) -> np.ndarray | None:
    for start in range(1, MAX_CYCLE + 1, 4096):
        cycles = np.arange(start, min(start + 4096, MAX_CYCLE + 1))
        counts = np.rint(cycles[:, None] * shares)
        error = np.abs(counts / cycles[:, None] / shares - 1.0).max(axis=1)
        good = np.flatnonzero((error < SHARE_TOLERANCE) & (counts.sum(axis=1) == cycles))
        if good.size:
            return counts[good[0]].astype(np.int64)
    return None


def _largest_remainder(shares: Sequence[Fraction], cycle: int) -> np.ndarray:
    counts = [math.floor(share * cycle) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda i: (counts[i] - shares[i] * cycle, i))
    for source in by_remainder[: cycle - sum(counts)]:
        counts[source] += 1
    return np.array(counts, dtype=np.int64)


def _spread(counts: Sequence[int]) -> np.ndarray:
    """The source of every slot of the cycle, int64 [sum(counts)].

    The j-th block (from 0) of a source with c of N slots must be in [floor(j N / c), ceil((j + 1) N / c)): then the
    source is less than one block ahead or behind at every prefix. Giving each slot to the open window that closes
    first meets all windows: a fluid schedule does, and earliest deadline first is optimal for unit jobs on one machine.
    Source: Baruah et al. 1996, Proportionate Progress; Jackson 1955 for the rule.
    """
    cycle = sum(counts)
    placed = [0] * len(counts)
    waiting = [(0, source) for source in range(len(counts))]  # (opens, source)
    opened: list[tuple[int, int]] = []  # (closes, source)
    slots = np.empty(cycle, dtype=np.int64)
    for slot in range(cycle):
        while waiting and waiting[0][0] <= slot:
            _, source = heapq.heappop(waiting)
            heapq.heappush(opened, (-(-(placed[source] + 1) * cycle // counts[source]), source))
        _, source = heapq.heappop(opened)
        slots[slot] = source
        placed[source] += 1
        if placed[source] < counts[source]:
            heapq.heappush(waiting, (placed[source] * cycle // counts[source], source))
    return slots
