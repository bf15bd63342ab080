"""The block order and the mixture: pure functions of the position, exact at every prefix."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_cpt.data.mixture import MAX_CYCLE, SHARE_TOLERANCE, Limit, Mixture, Stage, StagedMixture, quantise
from dist_cpt.data.order import FeistelOrder
from dist_cpt.errors import ConfigError


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 3000), st.integers(0, 2**63 - 1), st.text(max_size=5), st.integers(0, 100))
def test_order_is_a_permutation(num_blocks: int, seed: int, source: str, epoch: int) -> None:
    blocks = FeistelOrder(num_blocks, seed, source, epoch)(np.arange(num_blocks))
    assert np.array_equal(np.sort(blocks), np.arange(num_blocks))


def test_order_seeks_anywhere_and_depends_on_every_part_of_the_key() -> None:
    n = 10_000
    order = FeistelOrder(n, 7, "legal", 2)
    whole = order(np.arange(n))
    assert int(order(4321)) == whole[4321]
    assert order(np.array([[1, 2], [3, 4]])).tolist() == [[whole[1], whole[2]], [whole[3], whole[4]]]
    for other in (FeistelOrder(n, 8, "legal", 2), FeistelOrder(n, 7, "law", 2), FeistelOrder(n, 7, "legal", 3)):
        # Two random permutations of n agree in about one place.
        assert (other(np.arange(n)) == whole).sum() < 10


def test_order_never_changes() -> None:
    # A run that resumes after an upgrade must read the same stream: these numbers never change.
    assert FeistelOrder(10, 0, "a", 0)(np.arange(10)).tolist() == [4, 3, 0, 2, 1, 7, 9, 8, 6, 5]
    assert FeistelOrder(10**12, 3, "b", 1)(np.arange(3)).tolist() == [164736532731, 509616806884, 415966778413]


def test_order_looks_random() -> None:
    n = 4096
    blocks = FeistelOrder(n, 0, "s", 0)(np.arange(n)).astype(float)
    # Correlation with the identity, and of neighbours, has a standard deviation of 1/sqrt(n) = 0.016.
    assert abs(np.corrcoef(blocks, np.arange(n))[0, 1]) < 0.08
    assert abs(np.corrcoef(blocks[1:], blocks[:-1])[0, 1]) < 0.08


@pytest.mark.parametrize("position", [-1, 10])
def test_order_refuses_positions_outside(position: int) -> None:
    with pytest.raises(IndexError):
        FeistelOrder(10, 0)(position)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=8))
def test_every_prefix_is_within_one_block_of_every_share(weights: list[int]) -> None:
    mixture = Mixture(weights)
    sources, indices = mixture(np.arange(2 * mixture.cycle + 3))
    counts = np.cumsum(np.eye(len(weights), dtype=np.int64)[sources], axis=0)
    for p in range(1, len(sources) + 1):
        for source, weight in enumerate(weights):
            share = Fraction(weight, sum(weights))
            assert abs(int(counts[p - 1, source]) - share * p) < 1
    for source in range(len(weights)):
        mine = indices[sources == source]
        assert mine.tolist() == list(range(len(mine)))  # no block of a source skipped, none taken twice


def test_decimal_weights_are_exact() -> None:
    assert quantise([0.9, 0.1]).tolist() == [9, 1]
    assert quantise([0.7, 0.2, 0.1]).tolist() == [7, 2, 1]
    assert quantise([3, 3, 3]).tolist() == [1, 1, 1]
    assert quantise([0.333333, 0.666666]).tolist() == [1, 2]


@pytest.mark.parametrize("weights", [[0.123456789, 1.987654321], [0.7123, 0.19371, 0.013131, 1e-4]])
def test_other_weights_are_within_tolerance(weights: list[float]) -> None:
    counts = quantise(weights)
    shares = np.array(weights) / np.sum(weights)
    assert counts.sum() <= MAX_CYCLE
    assert (np.abs(counts / counts.sum() / shares - 1) < SHARE_TOLERANCE).all()


def test_many_sources_come_as_close_as_the_cycle_allows() -> None:
    weights = np.random.default_rng(0).random(50)
    counts = quantise(weights.tolist())
    assert np.abs(counts / counts.sum() - weights / weights.sum()).max() <= 1 / MAX_CYCLE


def test_a_weight_too_small_for_any_block_is_refused() -> None:
    with pytest.raises(ConfigError, match="1e-07"):
        Mixture([1.0, 1e-7])


@st.composite
def staged_mixtures(draw: st.DrawFn) -> tuple[StagedMixture, list[Stage], list[int | None]]:
    num_sources = draw(st.integers(1, 4))
    weights = st.lists(st.integers(0, 6), min_size=num_sources, max_size=num_sources).filter(any)
    stages = [Stage(draw(st.integers(1, 60)), draw(weights)) for _ in range(draw(st.integers(0, 3)))]
    stages.append(Stage(draw(st.none() | st.integers(1, 60)), draw(weights)))
    limits = [draw(st.none() | st.integers(1, 50)) for _ in range(num_sources)]
    return StagedMixture(stages, limits), stages, limits


@settings(deadline=None, max_examples=150)
@given(staged_mixtures())
def test_shares_are_exact_in_every_segment_and_no_block_is_lost_or_doubled(drawn) -> None:
    mixture, stages, limits = drawn
    length = mixture.segments[-1].start + 40
    read = [mixture(position) for position in range(length)]
    counts = np.zeros((length + 1, len(limits)), dtype=np.int64)
    for position, (source, index) in enumerate(read):
        assert index == counts[position, source]  # the next one of its source, over all borders
        counts[position + 1] = counts[position]
        counts[position + 1, source] += 1
    assert all(mixture.counts_before(p).tolist() == counts[p].tolist() for p in range(length + 1))
    borders = np.cumsum([stage.num_blocks or 0 for stage in stages]).tolist()
    ends = [*(segment.start for segment in mixture.segments[1:]), length]
    for segment, end in zip(mixture.segments, ends, strict=True):
        for position in range(segment.start, end + 1):
            given = counts[position] - counts[segment.start]
            assert (np.abs(given - (position - segment.start) * segment.shares) < 1).all()
        stage = stages[min(sum(border <= segment.start for border in borders[:-1]), len(stages) - 1)]
        named = [s for s, weight in enumerate(stage.weights) if weight]
        left = [s for s in named if limits[s] is None or counts[segment.start, s] < limits[s]]
        whole = sum(stage.weights[s] for s in left or named)
        expected = [stage.weights[s] / whole if s in (left or named) else 0 for s in range(len(limits))]
        assert segment.shares == pytest.approx(expected)
        assert (not left) <= (mixture.end is not None and mixture.end <= segment.start)
    until = length if mixture.end is None else min(mixture.end, length)
    assert all(limit is None or counts[until, s] <= limit for s, limit in enumerate(limits))


def test_a_seek_costs_the_same_anywhere_and_stages_may_be_long() -> None:
    stages = [Stage(10**12, [0.9, 0.1, 0]), Stage(10**11, [0.5, 0.2, 0.3]), Stage(None, [0, 0, 1])]
    mixture = StagedMixture(stages, [None, 10**11 - 5, None])
    assert [segment.start for segment in mixture.segments] == [0, 10**12 - 50, 10**12, 11 * 10**11]
    assert mixture(10**12 - 1)[0] == 0  # the second source is used up
    assert mixture.counts_before(12 * 10**11).sum() == 12 * 10**11
    assert mixture(12 * 10**11) == (2, int(mixture.counts_before(12 * 10**11)[2]))


@pytest.mark.parametrize(
    ("limit", "most"),
    [
        (Limit(), None),
        (Limit(on_exhausted="drop"), 30),
        (Limit(max_epochs=2.5, on_exhausted="error"), 75),
        (Limit(max_epochs=0.1, on_exhausted="drop"), 3),
        (Limit(max_tokens=16 * 7 + 15, on_exhausted="drop"), 7),
        (Limit(max_tokens=16 * 70, max_epochs=2, on_exhausted="drop"), 60),
    ],
)
def test_a_limit_is_a_number_of_whole_blocks(limit: Limit, most: int | None) -> None:
    assert limit.num_blocks(30, 16) == most
