"""Packing: every token once, no block too long, and as tight as best-fit-decreasing by the book."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_cpt.data.packing import PackingPlan, pack


def tokens_of(plan: PackingPlan) -> list[tuple[int, int]]:
    return [(document, start + i) for document, start, length in plan.pieces.tolist() for i in range(length)]


def fills(plan: PackingPlan) -> list[int]:
    return [sum(length for _, _, length in plan.block(index)) for index in range(plan.num_blocks)]


def by_the_book(lengths: list[int], seq_len: int) -> list[int]:
    """Fill of each block when the longest piece goes into the fullest block that takes it."""
    pieces = [seq_len for n in lengths for _ in range(n // seq_len)] + [n % seq_len for n in lengths]
    blocks: list[int] = []
    for piece in sorted((p for p in pieces if p), reverse=True):
        fitting = [i for i, fill in enumerate(blocks) if fill + piece <= seq_len]
        if fitting:
            blocks[max(fitting, key=lambda i: blocks[i])] += piece
        else:
            blocks.append(piece)
    return blocks


@settings(deadline=None, max_examples=300)
@given(st.lists(st.integers(0, 50), max_size=60), st.integers(1, 17))
def test_every_token_once_and_tight(lengths: list[int], seq_len: int) -> None:
    plan = pack(np.array(lengths, dtype=np.int32), seq_len)
    assert sorted(tokens_of(plan)) == [(d, i) for d, n in enumerate(lengths) for i in range(n)]
    filled = fills(plan)
    assert len(filled) == plan.num_blocks
    assert all(0 < fill <= seq_len for fill in filled)
    assert all((plan.pieces["start"] % seq_len == 0).tolist())
    assert sorted(filled) == sorted(by_the_book(lengths, seq_len))
    assert plan.padding_fraction == pytest.approx(1 - sum(lengths) / (len(filled) * seq_len) if filled else 0.0)


def test_pieces_of_a_block_keep_document_order_and_the_plan_is_repeatable() -> None:
    lengths = np.random.default_rng(0).integers(1, 300, 2000)
    plan, again = pack(lengths, 128), pack(lengths, 128)
    np.testing.assert_array_equal(plan.block_offsets, again.block_offsets)
    np.testing.assert_array_equal(plan.pieces, again.pieces)
    assert all(plan.block(index) == sorted(plan.block(index)) for index in range(plan.num_blocks))


@pytest.mark.parametrize(
    ("stride", "sha256"),
    [
        (None, "ca6b10a466802500d1166f416edaf649549a82a171f02a328a725f744bba88bf"),
        (100, "73f59b4e331e906555781b36486e5f1fdb997efe332c9b0c1ca388b9bf3e2844"),
    ],
)
@pytest.mark.parametrize("at_a_time", [(1 << 17, 1 << 20), (60, 40)])
def test_the_plan_of_a_corpus_never_changes(
    stride: int | None, sha256: str, at_a_time: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs that began with an earlier version resume with the same blocks, whatever is in memory at a time."""
    monkeypatch.setattr("dist_cpt.data.packing._DOCUMENTS", at_a_time[0])
    monkeypatch.setattr("dist_cpt.data.packing._PIECES", at_a_time[1])
    plan = pack(np.arange(5000) * 7919 % 997, 256, stride)
    arrays = (plan.block_offsets, *(plan.pieces[name].astype("<i8") for name in ("document", "start", "length")))
    assert hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest() == sha256


@settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(st.integers(0, 50), st.booleans()), max_size=40), st.integers(1, 17))
def test_an_excluded_document_is_in_no_block(documents: list[tuple[int, bool]], seq_len: int) -> None:
    lengths = np.array([n for n, _ in documents], dtype=np.int32)
    excluded = np.flatnonzero([drop for _, drop in documents])
    plan = pack(lengths, seq_len, excluded=excluded)
    assert sorted(tokens_of(plan)) == [(d, i) for d, (n, drop) in enumerate(documents) if not drop for i in range(n)]
    assert plan.num_tokens == sum(n for n, drop in documents if not drop)


@pytest.mark.parametrize("seed", range(5))
def test_no_more_blocks_than_first_fit(seed: int) -> None:
    rng = np.random.default_rng(seed)
    lengths, seq_len = np.clip(rng.lognormal(4, 1, 500), 1, 512).astype(int), 512
    room: list[int] = []
    for n in lengths:
        at = next((i for i, free in enumerate(room) if free >= n), None)
        if at is None:
            room.append(seq_len - n)
        else:
            room[at] -= n
    assert pack(lengths, seq_len).num_blocks <= len(room)


def test_a_million_documents_lose_no_token_and_little_to_padding() -> None:
    lengths = np.clip(np.random.default_rng(0).lognormal(6, 1.3, 1_000_000), 2, 1e6).astype(np.int32)
    plan = pack(lengths, 4096)
    assert plan.padding_fraction < 1e-4
    assert plan.num_tokens == lengths.sum(dtype=np.int64)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(0, 50), max_size=30), st.integers(1, 17), st.integers(1, 17))
def test_windows_start_every_stride_and_the_last_reaches_the_end(lengths: list[int], a: int, b: int) -> None:
    seq_len, stride = max(a, b), min(a, b)
    plan = pack(np.array(lengths, dtype=np.int32), seq_len, stride)
    assert plan.overlap == seq_len - stride
    assert all(0 < fill <= seq_len for fill in fills(plan))
    expected = []
    for document, n in enumerate(lengths):
        start = 0
        while n:  # the course's loop, without its loss of the last tokens
            expected.append((document, start, min(seq_len, n - start)))
            if start + seq_len >= n:
                break
            start += stride
    assert sorted(plan.pieces.tolist()) == expected
