"""Which source the block at a position of the global stream comes from; weights become exact shares of a cycle.

Where the weights change, at the border of a stage or where a source is used up, another cycle begins.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Literal

import numpy as np

from dist_cpt.errors import ConfigError, DataError

if TYPE_CHECKING:
    from dist_cpt.data.prepared import Prepared

MAX_CYCLE = 100_000
SHARE_TOLERANCE = 1e-4  # relative error of a share, where MAX_CYCLE allows it


class Mixture:
    """A fixed cycle of sources, each spread evenly: `counts[s]` of every `cycle` blocks come from source s.

    For every source and at every prefix of p blocks, |blocks so far - p * counts / cycle| < 1, whatever
    the number of sources; at multiples of the cycle it is 0.
    """

    def __init__(self, weights: Sequence[float | Fraction]) -> None:
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

    def counts_before(self, position: int) -> np.ndarray:
        """Blocks of each source in [0, position), int64 [num_sources]."""
        cycles, rest = divmod(position, self.cycle)
        return cycles * self.counts + np.bincount(self._source[:rest], minlength=len(self.counts))

    def position_of(self, source: int, index: int) -> int:
        """Where the block number `index` of a source is."""
        cycles, rank = divmod(index, int(self.counts[source]))
        return cycles * self.cycle + int(np.flatnonzero(self._source == source)[rank])


@dataclass(frozen=True)
class Limit:
    """How much of a source is read, and what follows its last block."""

    max_tokens: int | None = None  # padding included
    max_epochs: float | None = None
    on_exhausted: Literal["repeat", "error", "drop"] = "repeat"

    def num_blocks(self, available: int, seq_len: int) -> int | None:
        """Most blocks that are read of a source with `available` blocks; None: it repeats."""
        if self.on_exhausted == "repeat":
            return None
        limits = [] if self.max_tokens is None else [self.max_tokens // seq_len]
        limits += [] if self.max_epochs is None else [int(Fraction(repr(float(self.max_epochs))) * available)]
        return min(limits, default=available)


UNLIMITED = Limit()


@dataclass(frozen=True)
class Stage:
    """A part of the stream with weights of its own."""

    num_blocks: int | None  # None, of the last stage only: without end
    weights: Sequence[float | Fraction]  # by source; 0: not read


@dataclass(frozen=True)
class Segment:
    """Positions from `start` on that one cycle fills."""

    start: int
    sources: list[int]  # those of its mixture
    counts: np.ndarray  # int64 [num_sources], blocks of each source before `start`
    mixture: Mixture

    @property
    def shares(self) -> np.ndarray:
        """Share of the blocks by source, fp64 [num_sources]."""
        shares = np.zeros(len(self.counts))
        shares[self.sources] = self.mixture.counts / self.mixture.cycle
        return shares


class StagedMixture:
    """A mixture whose weights change at the borders of stages, and where a source has given its last block.

    Within a segment every prefix has the exact shares of a `Mixture`. A seek costs O(log segments).
    """

    def __init__(self, stages: Sequence[Stage], limits: Sequence[int | None]) -> None:
        """`limits` are the most blocks of each source; the source is then dropped, and the others share its part."""
        self.num_sources = len(limits)
        self.end: int | None = None  # where no source is left; the stream continues as if there were no limits
        self.segments: list[Segment] = []
        start, counts = 0, np.zeros(self.num_sources, dtype=np.int64)
        for stage in stages:
            stop = None if stage.num_blocks is None else start + stage.num_blocks
            while stop is None or start < stop:
                segment, used_up = self._segment(start, counts, stage.weights, limits)
                self.segments.append(segment)
                border = min((p for p in (used_up, stop) if p is not None), default=None)
                if border is None:
                    break
                start, counts = border, self.counts_before(border)
        if stages[-1].num_blocks is not None and self.end is None:
            self.end = start
        self._starts = [segment.start for segment in self.segments]

    def __call__(self, position: int) -> tuple[int, int]:
        """Source, and index within that source, of a position (>= 0)."""
        segment = self.segments[bisect_right(self._starts, position) - 1]
        source, index = segment.mixture(position - segment.start)
        number = segment.sources[int(source)]
        return number, int(segment.counts[number]) + int(index)

    def counts_before(self, position: int) -> np.ndarray:
        """Blocks of each source in [0, position), int64 [num_sources]."""
        segment = self.segments[max(bisect_right(self.segments, position, key=lambda s: s.start) - 1, 0)]
        counts = segment.counts.copy()
        counts[segment.sources] += segment.mixture.counts_before(position - segment.start)
        return counts

    def first_position(self, reached: Callable[[np.ndarray], bool], up_to: int) -> int:
        """The least position in [0, up_to] whose `counts_before` are `reached`, which stays true once it is; else
        `up_to`."""
        return bisect_left(range(up_to), True, key=lambda position: bool(reached(self.counts_before(position))))

    def _segment(
        self, start: int, counts: np.ndarray, weights: Sequence[float | Fraction], limits: Sequence[int | None]
    ) -> tuple[Segment, int | None]:
        """The segment from `start` on, and where the first of its sources is used up."""
        named = [source for source in range(self.num_sources) if weights[source]]
        left = [source for source in named if limits[source] is None or counts[source] < limits[source]]
        if not left and self.end is None:
            self.end = start
        sources = left or named
        mixture = Mixture([weights[source] for source in sources])
        ends = [
            start + mixture.position_of(number, int(limit - counts[source]) - 1) + 1
            for number, source in enumerate(left)
            if (limit := limits[source]) is not None
        ]
        return Segment(start, sources, counts, mixture), min(ends, default=None)


def mixture_of(prepared: Prepared, sizes: Sequence[tuple[int, int]]) -> StagedMixture:
    """The mixture of the training sources, whose blocks and tokens, padding aside, are `sizes`.

    Raises:
        ConfigError: a weight is too small.
        DataError: a limit leaves no block of a source.
    """
    dropped: list[int | None] = []
    sources = prepared.sources or prepared.streamed
    for source, (blocks, _) in zip(sources, sizes, strict=True):
        limit = source.limit.num_blocks(blocks, prepared.seq_len)
        if limit == 0:
            raise DataError(
                f"source {source.name}: {source.limit.max_epochs:g} epochs of {blocks:,} blocks are not one block",
                remedy="raise data.sources[].max_epochs, or leave the source out",
            )
        # An error is found by comparing counts: only a source that is dropped changes the stream.
        dropped.append(limit if source.limit.on_exhausted == "drop" else None)
    # A share of tokens is one of blocks, each counted by the tokens that the source's blocks have on average.
    per_token = [Fraction(blocks, tokens) if prepared.share_of == "tokens" else Fraction(1) for blocks, tokens in sizes]

    def stage(num_blocks: int | None, weights: Sequence[float]) -> Stage:
        exact = [Fraction(repr(float(weight))) * blocks for weight, blocks in zip(weights, per_token, strict=True)]
        return Stage(num_blocks, exact)

    names = [source.name for source in sources]
    stages = [
        stage(one.tokens and -(-one.tokens // prepared.seq_len), [one.weights.get(name, 0.0) for name in names])
        for one in prepared.stages
    ]
    return StagedMixture(stages or [stage(None, [source.weight for source in sources])], dropped)


def quantise(weights: Sequence[float | Fraction]) -> np.ndarray:
    """Blocks of each source in a cycle, int64 [num_sources]: exact where the weights' common denominator allows it.

    Otherwise the shortest cycle within SHARE_TOLERANCE of every share, or the closest one of MAX_CYCLE blocks.

    Raises:
        ConfigError: a weight is not positive, or too small for one block in MAX_CYCLE.
    """
    # repr is the decimal in the recipe: 0.1 is exactly one tenth, not the nearest binary fraction.
    exact = [w if isinstance(w, Fraction) else Fraction(repr(float(w))) for w in weights]
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
            f"data.sources: weight {float(weights[source]):g} is {float(shares[source]):.2g} of the whole",
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
