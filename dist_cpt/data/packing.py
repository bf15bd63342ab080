"""Documents -> blocks of seq_len tokens, as pure integers; every token in exactly one block.

Documents longer than a block are split into full pieces and one remainder; remainders and short documents are packed
best-fit-decreasing. With a stride below seq_len the pieces of a long document overlap.
Source: Ding et al. 2024, Fewer Truncations Improve Language Modeling (arXiv 2404.10830).

Which block a piece goes to depends on its length and on how many pieces of that length precede it, so the decision
needs only the number of pieces of every length: memory beside the plan itself does not grow with the corpus.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from dist_cpt.runtime.liveness import made_progress

PIECE = np.dtype([("document", "<i8"), ("start", "<i4"), ("length", "<i4")])  # start: token offset in the document
NewArray = Callable[[str, int, np.dtype], np.ndarray]  # (name, length, dtype) -> zeros
_DOCUMENTS, _PIECES = 1 << 17, 1 << 20  # in memory at a time


@dataclass(frozen=True)
class PackingPlan:
    """The pieces of documents in each block; those of block b are block_offsets[b] to block_offsets[b + 1]."""

    seq_len: int
    block_offsets: np.ndarray  # int64 [num_blocks + 1] into `pieces`
    pieces: np.ndarray  # PIECE [num_pieces], each of at most seq_len tokens
    num_tokens: int  # in all blocks, without padding; with overlap a token counts in every piece that has it
    overlap: int = 0  # tokens that a piece shares with the previous piece of its document

    @property
    def num_blocks(self) -> int:
        return len(self.block_offsets) - 1

    @property
    def padding_fraction(self) -> float:
        """Share of the blocks' positions that are padding."""
        return 1.0 - self.num_tokens / (self.num_blocks * self.seq_len) if self.num_blocks else 0.0

    def block(self, index: int) -> list[tuple[int, int, int]]:
        """(document, start, length) of every piece of one block."""
        first, last = self.block_offsets[index : index + 2].tolist()
        return self.pieces[first:last].tolist()


def document_lengths(plan: PackingPlan, block: int) -> list[int]:
    """Tokens of each piece in a block, as attention sees them: padding is one more."""
    lengths = [length for _, _, length in plan.block(block)]
    padding = plan.seq_len - sum(lengths)
    return [*lengths, padding] if padding else lengths


def _in_memory(name: str, length: int, dtype: np.dtype) -> np.ndarray:
    return np.zeros(length, dtype)


def pack(
    lengths: np.ndarray,
    seq_len: int,
    stride: int | None = None,
    excluded: np.ndarray | None = None,
    new_array: NewArray = _in_memory,
) -> PackingPlan:
    """Plan blocks for documents of `lengths` int [num_documents]; pieces in a block are in document order.

    `stride` is the distance between the starts of a document's pieces, at most and by default `seq_len`. The documents
    `excluded`, int64 in ascending order, are in no block. `new_array` makes the arrays of the plan.
    """
    stride = seq_len if stride is None else stride
    excluded = np.zeros(0, np.int64) if excluded is None else np.asarray(excluded, np.int64)
    counts = np.zeros(seq_len + 1, np.int64)
    for pieces in _pieces(lengths, seq_len, stride, excluded):
        counts += np.bincount(pieces["length"], minlength=seq_len + 1)
    runs, num_blocks = _best_fit_decreasing(counts, seq_len)
    offsets = new_array("offsets", num_blocks + 1, np.dtype("<i8"))
    for start, stop, per_block, _ in runs.tolist():
        offsets[start + 1 : stop + 1] += per_block
    np.cumsum(offsets, out=offsets)
    placed = new_array("pieces", int(counts.sum()), PIECE)
    _place(_pieces(lengths, seq_len, stride, excluded), counts, runs, offsets, placed)
    _sort_blocks(offsets, placed)
    num_tokens = int((counts * np.arange(seq_len + 1)).sum())
    return PackingPlan(seq_len, offsets, placed, num_tokens, overlap=seq_len - stride)


def _pieces(lengths: np.ndarray, seq_len: int, stride: int, excluded: np.ndarray) -> Iterator[np.ndarray]:
    """PIECE arrays, in document order: one piece every `stride`, the last of a document being the first that reaches
    its end."""
    first = 0
    while first < len(lengths):
        part = np.asarray(lengths[first : first + _DOCUMENTS]).astype(np.int64)
        begin, end = np.searchsorted(excluded, [first, first + len(part)])
        part[excluded[begin:end] - first] = 0
        num_pieces = np.where(part > 0, 1 - (-np.maximum(part - seq_len, 0) // stride), 0)
        ends = np.cumsum(num_pieces)
        taken = max(1, int(np.searchsorted(ends, _PIECES, side="right")))
        part, num_pieces, ends = part[:taken], num_pieces[:taken], ends[:taken]
        document = np.repeat(np.arange(taken), num_pieces)
        pieces = np.empty(len(document), PIECE)
        pieces["document"] = first + document
        start = (np.arange(len(document)) - np.repeat(ends - num_pieces, num_pieces)) * stride
        pieces["start"] = start
        pieces["length"] = np.minimum(part[document] - start, seq_len)
        yield pieces
        made_progress()
        first += taken


def _best_fit_decreasing(counts: np.ndarray, seq_len: int) -> tuple[np.ndarray, int]:
    """Blocks for `counts[n]` pieces of n tokens: runs int64 [num_runs, 4], and the number of blocks.

    A run (start, stop, per_block, held) puts the next pieces, longest first, into the blocks from `start` to `stop`,
    `per_block` into each, which hold `held` pieces already. Blocks with the same free space are kept as ranges, so the
    cost grows with the number of distinct lengths, not of pieces.
    """
    runs: list[tuple[int, int, int, int]] = []
    free: dict[int, list[tuple[int, int, int]]] = {}  # free space -> ranges of blocks, and how many pieces each holds
    spaces: list[int] = []  # the keys of `free`, ascending
    num_blocks = 0

    def release(space: int, start: int, stop: int, held: int) -> None:
        if space and start < stop:
            if space not in free:
                free[space] = []
                insort(spaces, space)
            free[space].append((start, stop, held))

    for length in np.flatnonzero(counts)[::-1].tolist():
        left = int(counts[length])
        while left:
            at = bisect_left(spaces, length)
            if at == len(spaces):  # nothing fits: open as many blocks as the rest of this length needs
                space, held = seq_len, 0
                start = num_blocks
                stop = num_blocks = start - (-left // (seq_len // length))
            else:
                space = spaces[at]
                start, stop, held = free[space].pop()
                if not free[space]:
                    del free[space], spaces[at]
            # The tightest block stays the tightest while one more piece fits, so it is filled up first.
            per_block = space // length
            filled = min(stop - start, left // per_block)
            if filled:
                runs.append((start, start + filled, per_block, held))
                left -= filled * per_block
                release(space - per_block * length, start, start + filled, held + per_block)
                start += filled
            if start < stop and left:  # fewer pieces are left than fit into one block
                runs.append((start, start + 1, left, held))
                release(space - left * length, start, start + 1, held + left)
                start, left = start + 1, 0
            release(space, start, stop, held)
    return np.array(runs, np.int64).reshape(-1, 4), num_blocks


def _place(
    chunks: Iterator[np.ndarray], counts: np.ndarray, runs: np.ndarray, offsets: np.ndarray, placed: np.ndarray
) -> None:
    """Write every piece into a slot of its block, in `placed`."""
    starts, stops, per_block, held = runs.T
    first_of_run = np.cumsum((stops - starts) * per_block) - (stops - starts) * per_block
    next_of_length = counts.sum() - np.cumsum(counts)  # longer pieces come first
    for pieces in chunks:
        pieces = pieces[np.argsort(pieces["length"], kind="stable")]
        here = np.bincount(pieces["length"], minlength=len(counts))
        rank = np.arange(len(pieces)) - np.repeat(np.cumsum(here) - here, here)  # among those of its length
        number = next_of_length[pieces["length"]] + rank
        next_of_length += here
        run = np.searchsorted(first_of_run, number, side="right") - 1
        block, slot = np.divmod(number - first_of_run[run], per_block[run])
        placed[offsets[starts[run] + block] + held[run] + slot] = pieces


def _sort_blocks(offsets: np.ndarray, placed: np.ndarray) -> None:
    """Bring the pieces of every block into document order."""
    first = 0
    while first < len(offsets) - 1:
        here = offsets[first : first + _PIECES + 1]
        last = first + max(1, int(np.searchsorted(here, here[0] + _PIECES, side="right")) - 1)
        begin, end = int(offsets[first]), int(offsets[last])
        pieces = placed[begin:end]
        block = np.repeat(np.arange(last - first), np.diff(offsets[first : last + 1]))
        placed[begin:end] = pieces[np.lexsort((pieces["start"], pieces["document"], block))]
        first = last
