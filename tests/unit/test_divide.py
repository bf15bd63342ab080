"""The blocks of a step over ranks: every block once, and attention shared out as evenly as the blocks allow."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dist_cpt.config.load import build
from dist_cpt.config.resolve import StepShape
from dist_cpt.data.loader import BlockLoader
from dist_cpt.data.prepared import Prepared, PreparedSource
from dist_cpt.data.store import StoreWriter, TokenStore
from dist_cpt.model.attention import Packing
from dist_cpt.train.divide import Division, attended, divide, layer_windows, max_over_mean
from tests.small_config import config
from tests.tiny_stores import PAD, L, two_sources
from tests.wandb_session import record

COSTS = st.lists(st.integers(1, 1000), min_size=72, max_size=72)
STREAM_ORDER = [0] * 72


@given(costs=COSTS, num_groups=st.sampled_from([1, 2, 3, 4]), micro_batch=st.sampled_from([1, 2, 3]))
def test_every_block_is_computed_once(costs: list[int], num_groups: int, micro_batch: int) -> None:
    forwards = divide(costs, num_groups, micro_batch)
    assert [[len(numbers) for numbers in groups] for groups in forwards] == [[micro_batch] * num_groups] * len(forwards)
    assert sorted(number for groups in forwards for numbers in groups for number in numbers) == list(range(72))


@given(costs=COSTS, num_groups=st.sampled_from([2, 3, 4]))
def test_no_division_of_single_blocks_is_more_even(costs: list[int], num_groups: int) -> None:
    """However 72 blocks are dealt, the k-th costliest forward has a block at least as costly as the (k G)-th."""
    most = sum(max(costs[n] for [n] in groups) for groups in divide(costs, num_groups, 1))
    assert most == sum(sorted(costs, reverse=True)[::num_groups])
    assert max_over_mean(costs, divide(costs, num_groups, 1)) <= max_over_mean(
        costs, divide(STREAM_ORDER, num_groups, 1)
    )


def test_equal_blocks_stay_in_stream_order() -> None:
    assert divide([5] * 8, 2, 1) == [[[0], [1]], [[2], [3]], [[4], [5]], [[6], [7]]]
    assert divide([5, 5, 5, 9], 2, 1) == [[[3], [0]], [[2], [1]]]  # the second forward evens out the first


@pytest.mark.parametrize("window", [None, 1, 4, 7, 40])
def test_pairs_are_those_of_the_mask(window: int | None) -> None:
    lengths = [1, 9, 3, 7]
    documents = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))[None]
    assert attended(lengths, {window: 3}) == 3 * int(Packing(document_BL=documents).mask(window).sum())


def test_a_document_length_is_what_the_batch_says(tmp_path: Path) -> None:
    loader = BlockLoader(two_sources(tmp_path), L, 0, PAD)
    for position in range(40):
        borders = loader.batch([position]).cu_seqlens.tolist()
        assert loader.document_lengths(position) == [stop - start for start, stop in pairwise(borders)]


@pytest.mark.parametrize("micro_batch", [1, 2])
def test_attention_of_packed_documents_is_even(micro_batch: int, tmp_path: Path) -> None:
    """Exact counts over 10 steps of log-normal documents in blocks of 1,024 tokens, 8 ranks of 8 blocks each."""
    lengths = np.exp(np.random.default_rng(0).normal(5.5, 1.2, 3000)).astype(int) + 2
    (tmp_path / "s").mkdir()
    writer = StoreWriter(tmp_path / "s", 60_000)
    writer.append(np.zeros(lengths.sum(), dtype=np.int32), lengths.astype(np.int32))
    writer.finish("t", {"name": "s"}, {}, [])
    source = PreparedSource("s", 1.0, "domain", TokenStore.open(tmp_path / "s"))
    loader = BlockLoader(Prepared([source], [], "t", 60_000, "i", 1024), 1024, 0, PAD)
    shape = StepShape(64, micro_batch, 8 // micro_batch, 10, world_size=8)
    division = Division(loader, shape, {None: 1})
    for start in range(0, 640, 64):
        costs = [attended(loader.document_lengths(start + n), {None: 1}) for n in range(64)]
        before = max_over_mean(costs, divide([0] * 64, 8, micro_batch))
        by_rank = [[p for blocks in division.positions(start, rank) for p in blocks] for rank in range(8)]
        assert sorted(p for positions in by_rank for p in positions) == list(range(start, start + 64))
        sums = [sum(costs[p - start] for p in positions) for positions in by_rank]
        print(start, round(before, 3), division.max_over_mean(start), max(sums) * 8 / sum(sums))
        assert before > 1.2
        assert (division.max_over_mean(start) or 0.0) < 1.12
        assert max(sums) * 8 / sum(sums) < 1.12


def test_one_group_of_ranks_has_nothing_to_share_out(tmp_path: Path) -> None:
    loader = BlockLoader(two_sources(tmp_path), L, 0, PAD)
    division = Division(loader, StepShape(4, 2, 2, 1, world_size=2, context_parallel=2), {None: 1})
    assert (division.positions(8, 0), division.max_over_mean(8)) == ([[8, 9], [10, 11]], None)


def test_windows_are_those_of_the_model_and_all_see_all_where_it_is_unknown() -> None:
    values = config().model_dump(mode="json")
    gemma = {"model_type": "gemma2", "num_hidden_layers": 4, "sliding_window": 64, "vocab_size": 99}
    values["model"] |= {"path": None, "config": gemma}
    values["adapter"]["kind"] = "none"
    values["data"]["tokenizer"] = "t"
    assert layer_windows(build(values, "x")) == {64: 2, None: 2}
    assert layer_windows(config()) == {None: 1}  # no such folder
    values["model"]["config"] = gemma | {
        "model_type": "lfm2",
        "layer_types": ["conv", "full_attention", "conv", "conv"],
    }
    assert layer_windows(build(values, "x")) == {None: 1}  # one of its layers attends


def test_charts_have_the_ratio_where_there_is_one() -> None:
    row = record(1)
    assert row.efficiency_by_chart() == {}
    known = replace(row, attention_max_over_mean=1.25, mfu=0.4)
    assert known.efficiency_by_chart() == {"train/mfu": 0.4, "train/attention_max_over_mean": 1.25}
