"""What a run asks of its sources: epochs as a length, limits, stages, shares of tokens."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_cpt.config.schema import StageConfig
from dist_cpt.data.budget import blocks_of_epochs, require_enough
from dist_cpt.data.concerns import concerns
from dist_cpt.data.loader import BlockLoader
from dist_cpt.data.mixture import Limit
from dist_cpt.data.prepared import Prepared, PreparedSource
from dist_cpt.errors import DataError
from tests.tiny_stores import PAD, L, make_store, num_blocks, prepared_of, two_sources


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return two_sources(tmp_path_factory.mktemp("stores"))


def limited(prepared: Prepared, *limits: Limit, **changes) -> Prepared:
    sources = [replace(source, limit=limit) for source, limit in zip(prepared.sources, limits, strict=True)]
    return replace(prepared, sources=sources, **changes)


def test_without_limits_and_stages_the_stream_never_changes(two: Prepared) -> None:
    # A run that resumes after an upgrade must read the same stream: this number never changes.
    loader = BlockLoader(two, L, 3, PAD)
    stream = json.dumps([loader.describe(position) for position in range(3000)])
    assert hashlib.sha256(stream.encode()).hexdigest() == (
        "5ea6ea072dbbd49afc5a30ae1815ddda54a7115d75761f43bc6aec94d7acf380"
    )


STAGES = (
    StageConfig(tokens=100 * L, weights={"a": 1}),
    StageConfig(tokens=100 * L - 3, weights={"a": 0.25, "b": 0.75}),
    StageConfig(weights={"b": 1}),
)


@settings(deadline=None, max_examples=25)
@given(world=st.integers(1, 8), micro_batch=st.integers(1, 3), start=st.integers(0, 260))
def test_the_stream_of_stages_and_drops_is_the_same_for_every_world_size(
    two: Prepared, world: int, micro_batch: int, start: int
) -> None:
    mixed = limited(two, Limit(max_epochs=0.7, on_exhausted="drop"), Limit(), stages=STAGES)
    whole = BlockLoader(mixed, L, 3, PAD).batch(range(start, start + world * micro_batch))
    for rank in range(world):
        first = start + rank * micro_batch
        mine = BlockLoader(mixed, L, 3, PAD).batch(range(first, first + micro_batch))
        assert mine.input_ids.tolist() == whole.input_ids[rank * micro_batch :][:micro_batch].tolist()


def test_an_epoch_is_whole_over_the_borders_of_stages(two: Prepared) -> None:
    loader = BlockLoader(limited(two, Limit(), Limit(), stages=STAGES), L, 3, PAD)
    read = [loader.describe(position) for position in range(460)]
    assert {source for source, _, _ in read[:100]} == {"a"}
    assert Counter(source for source, _, _ in read[100:200]) == {"a": 25, "b": 75}
    assert {source for source, _, _ in read[200:]} == {"b"}
    for number, source in enumerate(two.sources):
        blocks = [(epoch, block) for name, epoch, block in read if name == source.name]
        whole = len(blocks) // loader.available[number]
        assert whole >= 1
        expected = {(epoch, block) for epoch in range(whole) for block in range(loader.available[number])}
        assert set(blocks[: len(expected)]) == expected  # each block once an epoch, and the epochs in order


def test_epochs_are_passes_over_the_domain_sources(two: Prepared) -> None:
    a = num_blocks(two.sources[0])
    loader = BlockLoader(two, L, 0, PAD)
    for epochs in (0.3, 1, 2.5):
        blocks = blocks_of_epochs(two, loader, epochs)
        assert loader.blocks_read(blocks)["a"] >= epochs * a > loader.blocks_read(blocks - 1)["a"]
    both = replace(two, sources=[replace(source, role="domain") for source in two.sources])
    assert blocks_of_epochs(both, BlockLoader(both, L, 0, PAD), 2) == 2 * (a + num_blocks(two.sources[1]))


def test_epochs_that_are_never_reached_are_refused(two: Prepared) -> None:
    dropped = limited(two, Limit(on_exhausted="drop"), Limit())
    loader = BlockLoader(dropped, L, 0, PAD)
    assert loader.blocks_read(blocks_of_epochs(dropped, loader, 1))["a"] == num_blocks(two.sources[0])
    with pytest.raises(DataError, match=r"train.epochs: 1.5 is never reached"):
        blocks_of_epochs(dropped, loader, 1.5)


def test_an_error_names_the_source_and_where_it_ends(two: Prepared) -> None:
    limit = Limit(max_tokens=10 * L, on_exhausted="error")
    strict = limited(two, Limit(), limit)
    loader = BlockLoader(strict, L, 0, PAD)
    positions = [p for p in range(60) if loader.describe(p)[0] == "b"]
    require_enough(strict, loader, positions[10])
    with pytest.raises(
        DataError, match=rf"source b is used up at token {positions[10] * L} of {positions[10] * L + L}"
    ):
        require_enough(strict, loader, positions[10] + 1)


def test_a_mixture_that_ends_is_refused(two: Prepared) -> None:
    drop = Limit(on_exhausted="drop")
    dropped = limited(two, drop, drop)
    loader = BlockLoader(dropped, L, 0, PAD)
    everything = sum(loader.available)
    require_enough(dropped, loader, everything)
    read = [loader.describe(position) for position in range(everything)]
    assert len(set(read)) == everything
    with pytest.raises(DataError, match=f"nothing is left to read at token {everything * L:,}"):
        require_enough(dropped, loader, everything + 1)
    staged = replace(two, stages=STAGES[:2])
    with pytest.raises(DataError, match=f"at token {200 * L:,} of {201 * L:,}"):
        require_enough(staged, BlockLoader(staged, L, 0, PAD), 201)


def test_shares_of_tokens_are_those_of_the_text(tmp_path: Path) -> None:
    full = make_store(tmp_path / "full", [L] * 40, 10)
    half = make_store(tmp_path / "half", [L // 2 + 1] * 30, 10_000)
    sources = [PreparedSource("full", 0.5, "domain", full), PreparedSource("half", 0.5, "replay", half)]
    shares = {}
    for share_of in ("blocks", "tokens"):
        prepared = replace(prepared_of(sources), share_of=share_of)
        loader = BlockLoader(prepared, L, 0, PAD)
        counts = loader.batch(range(25 * 5)).counts_by_source
        shares[share_of] = [(counts / counts.sum(axis=0))[1, column] for column in (0, 1)]
    assert shares["blocks"] == pytest.approx([0.5, 9 / 25], abs=0.01)
    assert shares["tokens"] == pytest.approx([16 / 25, 0.5], abs=0.01)


def test_a_limit_below_one_block_is_refused(two: Prepared) -> None:
    with pytest.raises(DataError, match=r"source b: 0.001 epochs of .* blocks are not one block"):
        BlockLoader(limited(two, Limit(), Limit(max_epochs=0.001, on_exhausted="drop")), L, 0, PAD)


def test_a_source_of_one_block_is_named(two: Prepared, tmp_path: Path) -> None:
    small = PreparedSource("small", 1.0, "domain", make_store(tmp_path / "s", [5, 3], 10))
    one = prepared_of([small])
    [often, beyond, single] = concerns(one, BlockLoader(one, L, 0, PAD), 160)
    assert "source small is read 160.0 times" in often
    assert f"{160 * L:,} tokens" in beyond
    assert "source small is one block of 8 tokens" in single
