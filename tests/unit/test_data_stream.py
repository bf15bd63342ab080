"""Streams: windows cut as the whole is packed, every token of an epoch once, one order for ranks and resumes."""

from __future__ import annotations

import gc
import json
import os
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_cpt.config.schema import RunConfig
from dist_cpt.data.data_report import data_report, preview, report_lines
from dist_cpt.data.encode import Encoded
from dist_cpt.data.loader import BlockLoader
from dist_cpt.data.packing import pack
from dist_cpt.data.prepare import prepare
from dist_cpt.data.prepared import Prepared
from dist_cpt.data.store_plan import plan_stores
from dist_cpt.data.stream import BEGINNING, SourceStream
from dist_cpt.data.stream_loader import StreamLoader
from dist_cpt.data.streamed import StreamedSource, open_streamed, require_same_files
from dist_cpt.data.windows import Window, windows_of
from dist_cpt.errors import DataError
from dist_cpt.run_folder.train_state import Mark
from tests.prepared_by_many import recipe, write_input
from tests.whole_run import built, rows

L, PAD, WINDOW, UNIT_BYTES = 32, 1, 300, 2048


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_input(tmp_path_factory.mktemp("input"))


@pytest.fixture(scope="module")
def streamed(folder: Path) -> list[StreamedSource]:
    config = recipe(folder, folder / "cache", streaming=True)
    return open_streamed(plan_stores(config), config, UNIT_BYTES, WINDOW)


def loader_of(streamed: list[StreamedSource], weights: tuple[float, ...] = (0.5, 0.3, 0.2)) -> StreamLoader:
    """A loader that knows nothing of the past, as every rank and every attempt has one."""
    sources = [replace(source, weight=weight) for source, weight in zip(streamed, weights, strict=False)]
    prepared = Prepared([], [], "t", 512, "i", L, streamed=sources)
    return StreamLoader(prepared, {source.name: SourceStream(source, 7) for source in sources}, PAD)


def documents(lengths: list[int], chunks: list[int]) -> Iterator[Encoded]:
    """Documents of ids that rise by one, in pieces that end at these places."""
    ids, ends = np.arange(sum(lengths), dtype=np.int32), np.cumsum(lengths)
    borders = sorted({0, *(chunk % (len(ids) + 1) for chunk in chunks), len(ids)})
    for start, stop in pairwise(borders):
        inner = [int(end) for end in ends if start < end < stop]
        pieces = np.diff([start, *inner, stop]).astype(np.int32)
        yield Encoded(ids[start:stop], pieces, None, [], start not in (0, *ends.tolist()))


def pieces_of(window: Window) -> list[tuple[list[int], int | None]]:
    """The ids of every piece, and the target of the last, if it has one."""
    found = []
    for block in range(window.plan.num_blocks):
        for document, start, length in window.plan.block(block):
            first = window.start_of(document) + start
            more = start + length < window.lengths[document]
            found.append(
                (window.tokens[first : first + length].tolist(), int(window.tokens[first + length]) if more else None)
            )
    return found


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 90), min_size=1, max_size=30),
    st.lists(st.integers(0, 5000), max_size=12),
    st.integers(1, 120),
)
def test_windows_have_the_pieces_of_the_whole(lengths: list[int], chunks: list[int], num_tokens: int) -> None:
    windows = list(windows_of(documents(lengths, chunks), 8, num_tokens, 60_000, None))
    plan, starts = pack(np.array(lengths), 8), np.cumsum(lengths) - lengths
    whole = []
    for block in range(plan.num_blocks):
        for document, start, length in plan.block(block):
            first = int(starts[document]) + start
            more = start + length < lengths[document]
            whole.append((list(range(first, first + length)), first + length if more else None))
    assert sorted(piece for window in windows for piece in pieces_of(window)) == sorted(whole)
    sizes = [window.plan.num_tokens for window in windows]
    assert all(num_tokens <= size < num_tokens + 8 for size in sizes[:-1])
    assert sizes[-1] <= num_tokens + 8
    again = list(windows_of(documents(lengths, []), 8, num_tokens, 60_000, None))
    assert [pieces_of(window) for window in again] == [pieces_of(window) for window in windows]


def targets(batches: list[Any]) -> Counter[tuple[int, int]]:
    """(token, target) of every label."""
    pairs: Counter[tuple[int, int]] = Counter()
    for batch in batches:
        ids, labels = batch.input_ids.flatten(), batch.labels.flatten()
        pairs.update(zip(ids[labels != -100].tolist(), labels[labels != -100].tolist(), strict=True))
    return pairs


@pytest.mark.parametrize("number", range(3))
def test_an_epoch_has_every_token_and_target_of_the_store_once(
    folder: Path, streamed: list[StreamedSource], number: int
) -> None:
    prepared = prepare(recipe(folder, folder / "stores"))
    source = prepared.sources[number]
    loader = loader_of([streamed[number]], (1.0,))
    stream = loader._streams[0]
    num_blocks = next(n for n in range(10_000) if stream.mark_of(n).epoch == 1)
    batches = [loader.batch([position]) for position in range(num_blocks)]
    tokens = Counter(token for batch in batches for token in batch.input_ids.flatten().tolist())
    expected = Counter(source.store.tokens.tolist())
    del tokens[PAD], expected[PAD]
    assert tokens == expected
    whole = BlockLoader(Prepared([source], [], "t", 512, "i", L), L, 0, PAD)
    assert targets(batches) == targets([whole.batch([position]) for position in range(whole.available[0])])
    following = [loader.batch([position]) for position in range(num_blocks, 2 * num_blocks)]
    assert targets(following) == targets(batches)
    shown = [[batch.input_ids.flatten().tolist() for batch in part] for part in (batches, following)]
    assert sorted(shown[0]) == sorted(shown[1])
    assert shown[0] != shown[1]
    assert stream.epochs(num_blocks) == 1.0
    assert stream.epochs(2 * num_blocks - 3) == (2 * num_blocks - 3) / num_blocks
    assert 0.0 < stream.epochs(num_blocks - 1) < 1.0 or len(stream.source.text.units) == 1


def same(one: Any, other: Any) -> bool:
    names = ("input_ids", "labels", "position_ids", "cu_seqlens")
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in names)


@pytest.mark.parametrize("world", [2, 4, 8])
def test_one_stream_for_any_number_of_ranks(streamed: list[StreamedSource], world: int) -> None:
    steps, micro_batch = 6, 2
    whole = loader_of(streamed)
    for rank in range(world):
        mine = loader_of(streamed)
        for step in range(steps):
            first = (step * world + rank) * micro_batch
            mine.forget_before(step * world * micro_batch)
            positions = range(first, first + micro_batch)
            assert same(mine.batch(positions), whole.batch(positions))
        assert all(len(stream._windows) <= 3 + 2 * world for stream in mine._streams)


def test_a_document_length_is_what_the_batch_says(streamed: list[StreamedSource]) -> None:
    with closing(loader_of(streamed)) as loader:
        for position in range(30):
            borders = loader.batch([position]).cu_seqlens.tolist()
            assert loader.document_lengths(position) == [stop - start for start, stop in pairwise(borders)]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 400), st.integers(1, 40))
def test_a_resume_reads_at_most_one_shard_again(streamed: list[StreamedSource], position: int, num_blocks: int) -> None:
    before = loader_of(streamed)
    ids = [before.block_id(p) for p in range(position, position + num_blocks)]
    marks = before.marks(position)
    after = loader_of(streamed)
    after.learn({name: Mark(*mark) for name, mark in json.loads(json.dumps(marks)).items()})
    assert [after.block_id(p) for p in range(position, position + num_blocks)] == ids
    assert after.marks(position) == marks
    assert same(after.batch([position]), before.batch([position]))
    for stream in after._streams:
        shards = shard_tokens(stream.source)
        assert stream.reread_tokens < max(shards)
        assert len(stream._marks) <= 2 + stream._marks[-1].shard + stream._marks[-1].epoch * len(shards)
    if position:  # a rollback goes back behind what is kept
        before.forget_before(position)
        assert before.block_id(0) == loader_of(streamed).block_id(0)


_SHARDS: dict[str, list[int]] = {}


def shard_tokens(source: StreamedSource) -> list[int]:
    """The tokens of every shard, in the order of the first epoch."""
    if source.name not in _SHARDS:
        stream, number, tokens = SourceStream(source, 7), 0, Counter[int]()
        while (placed := stream.block(number)[0]).mark.epoch == 0:
            tokens[placed.mark.shard] += placed.window.plan.num_tokens
            number = placed.end
        _SHARDS[source.name] = list(tokens.values())
    return _SHARDS[source.name]


def test_shards_windows_and_blocks_are_shuffled(streamed: list[StreamedSource]) -> None:
    stream = SourceStream(streamed[0], 7)
    number, first_tokens, shards = 0, [], []
    while (placed := stream.block(number)[0]).mark.epoch < 2:
        shards.append((placed.mark.epoch, placed.mark.shard))
        first_tokens.append(placed.window.tokens[:8].tolist())
        number = placed.end
    assert shards == sorted(shards)
    epochs = [[tokens for (epoch, _), tokens in zip(shards, first_tokens, strict=True) if epoch == e] for e in (0, 1)]
    assert epochs[0] != epochs[1]
    assert sorted(epochs[0]) == sorted(epochs[1])
    other = SourceStream(streamed[0], 8)
    assert [other.block(n)[0].window.tokens[:8].tolist() for n in (0,)] != first_tokens[:1] or other.block(0)[1] != 0


def test_a_stream_that_is_dropped_open_does_not_wait_for_the_garbage_collector(
    streamed: list[StreamedSource],
) -> None:
    """Collected on a thread that is just starting, it would wait for its own threads for ever."""
    stream = SourceStream(streamed[0], 7)
    stream.block(0)
    dropped = weakref.ref(stream)
    gc.disable()
    try:
        del stream
        assert dropped() is None
    finally:
        gc.enable()


def test_bad_records_as_when_preparing(folder: Path, tmp_path: Path) -> None:
    config = recipe(folder, tmp_path / "cache", streaming=True)
    (source, *_) = open_streamed(plan_stores(config), config, UNIT_BYTES, WINDOW)
    stream = SourceStream(source, 7, tmp_path / "bad")
    number = 0
    while (placed := stream.block(number)[0]).mark.epoch < 1:
        number = placed.end
    kept = [row for path in sorted((tmp_path / "bad").iterdir()) for row in rows(path)]
    store = prepare(recipe(folder, tmp_path / "stores")).sources[0].store.folder
    assert kept == rows(store / "quarantine.jsonl")
    strict = recipe(folder, tmp_path / "cache", streaming=True, on_bad_record="error")
    stream = SourceStream(open_streamed(plan_stores(strict), strict, UNIT_BYTES, WINDOW)[0], 7)
    for _ in range(2):  # asked again it says the same
        with pytest.raises(DataError, match=r"lines\.jsonl:\d+: not valid JSON"):
            stream.block(10_000)
    few = recipe(folder, tmp_path / "cache", streaming=True, bad_record_budget_fraction=0.01)
    stream = SourceStream(open_streamed(plan_stores(few), few, UNIT_BYTES, WINDOW)[0], 7)
    with pytest.raises(DataError, match=r"lines \(shard \d+\).* records are bad .*budget_fraction 0.01"):
        stream.block(10_000)


def test_what_prepare_says_of_a_stream(folder: Path, tmp_path: Path) -> None:
    config = recipe(folder, tmp_path / "cache", streaming=True, on_bad_record="skip")
    lines = report_lines(data_report(prepare(config)))
    size = (folder / "lines.jsonl").stat().st_size
    assert lines[0] == f"lines: read while training, 1 shards of 1 files, {size:,} bytes, 33.3% of the blocks"
    assert not list((tmp_path / "cache").glob("*/manifest.json"))
    shown = list(preview(config))
    assert shown[0] == f"lines: 1 files, {size:,} bytes, read while training: {folder / 'lines.jsonl'}"
    assert len(shown) > 6


def test_a_source_without_a_document_is_named(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "none.jsonl").write_text('{"text": ""}\n')
    config = recipe(folder, tmp_path / "cache", streaming=True, sources=[{"path": str(tmp_path / "none.jsonl")}])
    with pytest.raises(DataError, match=r"none\.jsonl has no document"):
        SourceStream(open_streamed(plan_stores(config), config)[0], 7).block(0)


def test_changes_of_the_text_are_named(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"text": f"number {number} of many"}) + "\n" for number in range(400)]
    path.write_text("".join(lines))

    def opened() -> StreamedSource:
        config = recipe(folder, tmp_path / "cache", streaming=True, sources=[{"path": str(tmp_path / "*.jsonl")}])
        return open_streamed(plan_stores(config), config, UNIT_BYTES, WINDOW)[0]

    begun = opened()
    os.utime(path, ns=(1, 1))
    assert opened().identity == begun.identity
    require_same_files("a", begun.inputs, opened().inputs)
    assert "1 files were written since the run began, such as" in caplog.text
    with pytest.raises(DataError, match=r"a\.jsonl has changed while the run reads it"):
        SourceStream(begun, 7).block(0)
    with path.open("a") as file:
        file.write(lines[0])
    with pytest.raises(DataError, match=r"a\.jsonl has changed since the run began: [\d,]+ bytes then, [\d,]+ now"):
        require_same_files("a", begun.inputs, opened().inputs)
    path.write_text("".join(lines).replace("number 399", "numbre 399"))
    with pytest.raises(DataError, match=r"a\.jsonl has changed .*: its first or last 64 KiB differ"):
        require_same_files("a", begun.inputs, opened().inputs)
    assert opened().identity != begun.identity
    (tmp_path / "b.jsonl").write_text(lines[0])
    with pytest.raises(DataError, match=r"has 2 files, the run began with 1 \(b\.jsonl is new\)"):
        require_same_files("a", begun.inputs, opened().inputs)


def test_conversations_stream_with_their_answers(folder: Path, tmp_path: Path) -> None:
    said = [[("user", f"q {number}"), ("assistant", f"a {number}")] for number in range(40)]
    talks = [{"messages": [{"role": role, "content": text} for role, text in turns]} for turns in said]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(talk) + "\n" for talk in talks))
    answer = "{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}"
    template = "{% for m in messages %}{{ m.role }}:\n{% if m.role == 'assistant' %}" + answer
    template += "{% else %}{{ m.content }}\n{% endif %}{% endfor %}"
    values = recipe(folder, tmp_path / "cache", sources=[{"path": str(tmp_path / "chat.jsonl")}]).model_dump(
        mode="json"
    )
    values |= {"task": "instruct", "data": values["data"] | {"chat_template": template}}
    source = prepare(built(values)).sources[0]
    whole = BlockLoader(Prepared([source], [], "t", 512, "i", L), L, 0, PAD)
    config: RunConfig = built(values | {"data": values["data"] | {"streaming": True}})
    loader = loader_of(open_streamed(plan_stores(config), config, UNIT_BYTES, WINDOW), (1.0,))
    num_blocks = next(n for n in range(1000) if loader._streams[0].mark_of(n).epoch == 1)
    pairs = targets([loader.batch([position]) for position in range(num_blocks)])
    assert pairs == targets([whole.batch([position]) for position in range(whole.available[0])])
    assert source.store.answers is not None
    assert sum(pairs.values()) == int(source.store.answers.sum())
    assert BEGINNING in loader._streams[0]._marks
