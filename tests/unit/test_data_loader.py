"""Batches: document borders, labels, sources, and one stream whatever the number of ranks."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_cpt.data.batch import IGNORE_INDEX, Batch
from dist_cpt.data.concerns import concerns
from dist_cpt.data.loader import PADDING, BlockLoader, ValidationLoader
from dist_cpt.data.prefetch import prefetch
from dist_cpt.data.prepared import Prepared, PreparedSource
from tests.tiny_stores import EOS, PAD, L, make_store, num_blocks, prepared_of, two_sources


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return two_sources(tmp_path_factory.mktemp("stores"))


def check_layout(batch: Batch) -> None:
    """What every batch promises, from its arrays alone."""
    num_tokens = batch.input_ids.numel()
    borders = batch.cu_seqlens.tolist()
    assert batch.cu_seqlens.dtype == torch.int32
    assert borders[0] == 0
    assert borders[-1] == num_tokens
    assert all(a < b for a, b in pairwise(borders))
    assert set(range(0, num_tokens + 1, L)) <= set(borders)  # every block start is a border
    assert batch.max_seqlen == max(b - a for a, b in pairwise(borders))
    positions = batch.position_ids.flatten().tolist()
    assert positions == [i for a, b in pairwise(borders) for i in range(b - a)]
    assert batch.num_targets == int((batch.labels != IGNORE_INDEX).sum()) == batch.counts_by_source[:, 2].sum()
    assert int(batch.counts_by_source[:, 1].sum()) == int((batch.input_ids != PAD).sum())


def test_every_token_and_every_target_of_an_epoch_once(two: Prepared) -> None:
    loader = BlockLoader(prepared_of(two.sources[:1]), L, 0, PAD)
    store = two.sources[0].store
    batch = loader.batch(range(num_blocks(two.sources[0])))
    check_layout(batch)
    ids, labels = batch.input_ids.flatten().tolist(), batch.labels.flatten().tolist()
    assert sorted(i for i in ids if i != PAD) == sorted(store.tokens.tolist())
    # The pairs (token, next token) are those of the documents: none across a border, none lost at a split.
    following = {t: n for t, n in zip(store.tokens.tolist(), store.tokens[1:].tolist(), strict=False) if t != EOS}
    targets = {i: label for i, label in zip(ids, labels, strict=True) if label != IGNORE_INDEX}
    assert targets == following
    assert batch.num_targets == store.num_tokens - store.num_documents
    assert all(label == IGNORE_INDEX for i, label in zip(ids, labels, strict=True) if i in (EOS, PAD))


def test_position_ids_restart_with_each_document_and_padding(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s", [5, 3], 10)
    batch = BlockLoader(prepared_of([PreparedSource("s", 1.0, "domain", store)]), L, 0, PAD).batch([0])
    assert batch.position_ids.tolist() == [[*range(5), *range(3), *range(8)]]
    assert batch.input_ids.tolist() == [[10, 11, 12, 13, EOS, 15, 16, EOS, *[PAD] * 8]]
    i = IGNORE_INDEX
    assert batch.labels.tolist() == [[11, 12, 13, EOS, i, 16, EOS, i, *[i] * 8]]
    assert batch.cu_seqlens.tolist() == [0, 5, 8, 16]
    assert (batch.max_seqlen, batch.num_targets, batch.counts_by_source.tolist()) == (8, 6, [[1, 8, 6]])


def test_a_document_longer_than_a_block_keeps_the_target_at_the_split(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s", [2 * L + 1], 100)
    loader = BlockLoader(prepared_of([PreparedSource("s", 1.0, "domain", store)]), L, 0, PAD)
    rows = {int(b.input_ids[0, 0]): b for b in (loader.batch([p]) for p in range(3))}
    assert rows[100].labels[0, -1] == 100 + L
    assert rows[100 + L].labels[0, -1] == EOS
    assert rows[EOS].num_targets == 0  # the EOS alone: its block has one token and 15 of padding
    assert rows[100 + L].position_ids.tolist() == [list(range(L))]


@settings(deadline=None, max_examples=40)
@given(
    world=st.sampled_from([1, 2, 3, 4, 8]),
    micro_batch=st.integers(1, 3),
    accumulation=st.integers(1, 3),
    start=st.integers(0, 5000),
)
def test_the_stream_is_the_same_for_every_world_size(
    two: Prepared, world: int, micro_batch: int, accumulation: int, start: int
) -> None:
    loader = BlockLoader(two, L, 3, PAD)
    whole = loader.batch(range(start, start + world * micro_batch * accumulation))
    rows: dict[int, tuple[list[int], list[int]]] = {}
    for rank in range(world):
        mine = BlockLoader(two, L, 3, PAD)  # each rank has its own loader and no memory of the past
        for m in range(accumulation):
            first = start + (m * world + rank) * micro_batch
            batch = mine.batch(range(first, first + micro_batch))
            for row, position in enumerate(batch.block_ids):
                rows[position] = (batch.input_ids[row].tolist(), batch.labels[row].tolist())
    assert sorted(rows) == list(whole.block_ids)
    assert [rows[p] for p in whole.block_ids] == [
        (i.tolist(), t.tolist()) for i, t in zip(whole.input_ids, whole.labels, strict=True)
    ]


def test_epochs_reshuffle_and_sources_keep_their_share(two: Prepared) -> None:
    loader = BlockLoader(two, L, 5, PAD)
    blocks = num_blocks(two.sources[1])
    seen: dict[int, list[int]] = {}
    counts = {"a": 0, "b": 0}
    for position in range(10 * blocks):
        source, epoch, block = loader.describe(position)
        counts[source] += 1
        assert abs(counts["b"] - 0.3 * (position + 1)) < 1
        if source == "b":
            seen.setdefault(epoch, []).append(block)
    assert sorted(seen) == [0, 1, 2]
    assert all(sorted(order) == list(range(blocks)) for order in seen.values())
    assert seen[0] != seen[1] != seen[2]
    batch = loader.batch(range(50))
    check_layout(batch)
    ids = batch.input_ids
    in_b = sum(int((row != PAD).sum()) for p, row in enumerate(ids) if loader.describe(p)[0] == "b")
    assert batch.counts_by_source[1, 1] == in_b > 0


def test_another_seed_is_another_order(two: Prepared) -> None:
    one, other = BlockLoader(two, L, 0, PAD), BlockLoader(two, L, 1, PAD)
    assert [one.describe(p) for p in range(20)] != [other.describe(p) for p in range(20)]
    assert [one.describe(p)[0] for p in range(20)] == [other.describe(p)[0] for p in range(20)]


def test_validation_is_padded_to_any_number_of_ranks(two: Prepared) -> None:
    source = two.sources[0]
    loader = ValidationLoader(source, L, PAD)
    batch = loader.batch([loader.num_blocks - 1, loader.num_blocks, loader.num_blocks + 7])
    check_layout(batch)
    assert (batch.input_ids[1:] == PAD).all()
    assert (batch.labels[1:] == IGNORE_INDEX).all()
    assert batch.cu_seqlens.tolist()[-2:] == [2 * L, 3 * L]
    everything = loader.batch(range(loader.num_blocks))
    assert everything.num_targets == source.store.num_tokens - source.store.num_documents
    few = ValidationLoader(source, L, PAD, max_blocks=3)
    assert few.num_blocks == 3
    assert few.batch([0, 1, 2]).input_ids.tolist() == everything.input_ids[:3].tolist()
    assert (few.batch([3]).labels == IGNORE_INDEX).all()
    # A sample, not the longest documents: the plan's first three blocks are full pieces of long ones.
    assert few.batch([0, 1, 2]).cu_seqlens.numel() > 4


def test_a_training_batch_can_be_filled_up_with_padding(two: Prepared) -> None:
    loader = BlockLoader(two, L, 0, PAD)
    batch = loader.batch([3, PADDING])
    check_layout(batch)
    alone = loader.batch([3])
    assert torch.equal(batch.input_ids[:1], alone.input_ids)
    assert (batch.num_targets, batch.counts_by_source.tolist()) == (alone.num_targets, alone.counts_by_source.tolist())
    assert (batch.labels[1] == IGNORE_INDEX).all()


def test_prefetch_gives_the_same_batches_in_order_and_ends_its_thread(two: Prepared) -> None:
    loader = BlockLoader(two, L, 0, PAD)
    wanted = [range(i, i + 2) for i in range(0, 20, 2)]
    ahead = list(prefetch(loader.batch, wanted))
    assert [b.block_ids for b in ahead] == [tuple(w) for w in wanted]
    assert all(torch.equal(b.input_ids, loader.batch(w).input_ids) for b, w in zip(ahead, wanted, strict=True))
    half = prefetch(loader.batch, wanted)
    next(half)
    half.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("prefetch")]


def test_prefetch_raises_the_errors_of_its_thread(two: Prepared) -> None:
    loader = BlockLoader(two, L, 0, PAD)
    batches = prefetch(loader.batch, [[0], [-2], [2]])
    assert next(batches).block_ids == (0,)
    with pytest.raises(IndexError, match="0"):
        list(batches)


def test_the_loader_imports_no_transformers() -> None:
    code = "import sys, dist_cpt.data.loader; sys.exit('transformers' in sys.modules or 'tokenizers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("stride", [1, 5, L - 1, L])
def test_every_target_of_overlapping_windows(tmp_path: Path, stride: int) -> None:
    """overlap context: each target once, with the longest context that a window has for it; train: in all windows."""
    store = make_store(tmp_path / "s", [3 * L + 5, L, L + 1, 7], 10)
    starts = [store.start_of(document) for document in range(store.num_documents)]
    counts: dict[bool, dict[int, int]] = {}
    for repeats in (False, True):
        source = PreparedSource("s", 1.0, "domain", store, stride, repeats)
        loader = BlockLoader(prepared_of([source]), L, 0, PAD)
        times = counts[repeats] = {}
        for position in range(num_blocks(source)):
            batch = loader.batch([position])
            check_layout(batch)
            assert batch.num_targets == int((batch.labels != IGNORE_INDEX).sum())
            for at in np.flatnonzero(batch.labels[0] != IGNORE_INDEX).tolist():
                # A token names its place; its input is the one before it.
                place = int(batch.input_ids[0, at]) + 1
                assert int(batch.labels[0, at]) in (place, EOS)
                times[place] = times.get(place, 0) + 1
                if not repeats:
                    inside = place - 10 - starts[int(np.searchsorted(starts, place - 10, side="right")) - 1]
                    assert int(batch.position_ids[0, at]) + 1 >= min(inside, L - stride + 1)
    places = [10 + s + i for s, n in zip(starts, store.lengths, strict=True) for i in range(1, int(n))]
    assert sorted(counts[False]) == sorted(counts[True]) == places
    assert set(counts[False].values()) == {1}
    assert max(counts[True].values()) == min(-(-L // stride), 1 + -(-(2 * L + 5) // stride))


def test_epochs_are_counted_from_the_stream(two: Prepared) -> None:
    loader = BlockLoader(two, L, 0, PAD)
    cycles = 100  # weights of 0.7 and 0.3 repeat after ten blocks
    read = Counter(loader.describe(position)[0] for position in range(cycles))
    expected = {source.name: read[source.name] / num_blocks(source) for source in two.sources}
    assert loader.epochs(cycles) == pytest.approx(expected)


def test_repeated_text_and_held_out_text_that_is_trained_on_are_named(two: Prepared) -> None:
    loader = BlockLoader(two, L, 0, PAD)
    assert concerns(two, loader, 10) == []
    a, b = two.sources
    seen = replace(two, validation=[replace(a, name="test", role="domain")])
    [repeated, beyond, inside] = concerns(seen, loader, int(5 * num_blocks(b) / 0.3) + 1)
    assert "source b is read 5.0 times" in repeated
    assert "more than once" in beyond
    assert "test" in inside
    assert "source a" in inside
