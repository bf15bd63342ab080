"""Packing: every token once, no block too long, and as tight as best-fit-decreasing by the book."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_cpt.data.packing import PackingPlan, pack


def tokens_of(plan: PackingPlan) -> list[tuple[int, int]]:
    return [
        (document, start + i)
        for document, start, length in zip(
            plan.piece_document.tolist(), plan.piece_start.tolist(), plan.piece_length.tolist(), strict=True
        )
        for i in range(length)
    ]


def fills(plan: PackingPlan) -> list[int]:
    return [int(plan.piece_length[a:b].sum()) for a, b in zip(plan.block_offsets, plan.block_offsets[1:], strict=False)]


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
    assert all((plan.piece_start % seq_len == 0).tolist())
    assert sorted(filled) == sorted(by_the_book(lengths, seq_len))
    assert plan.padding_fraction == pytest.approx(1 - sum(lengths) / (len(filled) * seq_len) if filled else 0.0)


def test_pieces_of_a_block_keep_document_order_and_the_plan_is_repeatable() -> None:
    lengths = np.random.default_rng(0).integers(1, 300, 2000)
    plan, again = pack(lengths, 128), pack(lengths, 128)
    for name in ("block_offsets", "piece_document", "piece_start", "piece_length"):
        np.testing.assert_array_equal(getattr(plan, name), getattr(again, name))
    for a, b in zip(plan.block_offsets, plan.block_offsets[1:], strict=False):
        assert (np.diff(plan.piece_document[a:b]) >= 0).all()


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


def test_a_million_documents_take_seconds() -> None:
    lengths = np.clip(np.random.default_rng(0).lognormal(6, 1.3, 1_000_000), 2, 1e6).astype(np.int32)
    start = time.process_time()
    plan = pack(lengths, 4096)
    # About 0.4 s; the limit only catches a change of complexity.
    assert time.process_time() - start < 10
    assert plan.padding_fraction < 1e-4
    assert plan.num_tokens == lengths.sum(dtype=np.int64)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(0, 50), max_size=30), st.integers(1, 17), st.integers(1, 17))
def test_windows_start_every_stride_and_the_last_reaches_the_end(lengths: list[int], a: int, b: int) -> None:
    seq_len, stride = max(a, b), min(a, b)
    plan = pack(np.array(lengths, dtype=np.int32), seq_len, stride)
    assert plan.overlap == seq_len - stride
    assert all(0 < fill <= seq_len for fill in fills(plan))
    pieces = zip(plan.piece_document.tolist(), plan.piece_start.tolist(), plan.piece_length.tolist(), strict=True)
    expected = []
    for document, n in enumerate(lengths):
        start = 0
        while n:  # the course's loop, without its loss of the last tokens
            expected.append((document, start, min(seq_len, n - start)))
            if start + seq_len >= n:
                break
            start += stride
    assert sorted(pieces) == expected
