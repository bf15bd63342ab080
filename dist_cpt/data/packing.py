"""Documents -> blocks of seq_len tokens, as pure integers; every token in exactly one block.

Documents longer than a block are split into full pieces and one remainder; remainders and short documents are packed
best-fit-decreasing. With a stride below seq_len the pieces of a long document overlap.
Source: Ding et al. 2024, Fewer Truncations Improve Language Modeling (arXiv 2404.10830).
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class PackingPlan:
    """The pieces of documents in each block; those of block b are block_offsets[b] to block_offsets[b + 1]."""

    seq_len: int
    block_offsets: np.ndarray  # int64 [num_blocks + 1] into the piece arrays
    piece_document: np.ndarray  # int64 [num_pieces]
    piece_start: np.ndarray  # int64 [num_pieces], token offset inside the document
    piece_length: np.ndarray  # int32 [num_pieces], at most seq_len
    overlap: int = 0  # tokens that a piece shares with the previous piece of its document

    @property
    def num_blocks(self) -> int:
        return len(self.block_offsets) - 1

    @property
    def num_tokens(self) -> int:
        """Tokens in all blocks, without padding; with overlap a token counts in every piece that has it."""
        return int(self.piece_length.sum(dtype=np.int64))

    @property
    def padding_fraction(self) -> float:
        """Share of the blocks' positions that are padding."""
        return 1.0 - self.num_tokens / (self.num_blocks * self.seq_len) if self.num_blocks else 0.0


def pack(lengths: np.ndarray, seq_len: int, stride: int | None = None) -> PackingPlan:
    """Plan blocks for documents of `lengths` int [num_documents]; pieces in a block are in document order.

    `stride` is the distance between the starts of a document's pieces, at most and by default `seq_len`.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    stride = seq_len if stride is None else stride
    document, start, length = _split(lengths, seq_len, stride)
    longest_first = np.argsort(-length, kind="stable")
    block = np.empty(len(length), dtype=np.int64)
    block[longest_first], num_blocks = _best_fit_decreasing(length[longest_first], seq_len)
    by_block = np.argsort(block, kind="stable")
    offsets = np.zeros(num_blocks + 1, dtype=np.int64)
    np.cumsum(np.bincount(block, minlength=num_blocks), out=offsets[1:])
    pieces = (document[by_block], start[by_block], length[by_block].astype(np.int32))
    return PackingPlan(seq_len, offsets, *pieces, overlap=seq_len - stride)


def _split(lengths: np.ndarray, seq_len: int, stride: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Document, start and length, int64 [num_pieces] each, of pieces of at most seq_len: one every `stride`, the last
    of a document being the first that reaches its end."""
    pieces = np.where(lengths > 0, 1 - (-np.maximum(lengths - seq_len, 0) // stride), 0)
    document = np.repeat(np.arange(len(lengths), dtype=np.int64), pieces)
    first = np.cumsum(pieces) - pieces
    start = (np.arange(len(document), dtype=np.int64) - np.repeat(first, pieces)) * stride
    return document, start, np.minimum(lengths[document] - start, seq_len)


def _best_fit_decreasing(lengths: np.ndarray, seq_len: int) -> tuple[np.ndarray, int]:
    """The block of each piece, int64 [num_pieces], for lengths in descending order; and the number of blocks.

    Pieces of one length are placed together, and blocks with the same free space are kept as ranges, so the cost
    grows with the number of distinct lengths, not of pieces.
    """
    block_of = np.empty(len(lengths), dtype=np.int64)
    free: dict[int, list[tuple[int, int]]] = {}  # free space -> ranges of blocks
    spaces: list[int] = []  # the keys of `free`, ascending
    num_blocks = 0

    def release(space: int, start: int, stop: int) -> None:
        if space and start < stop:
            if space not in free:
                free[space] = []
                insort(spaces, space)
            free[space].append((start, stop))

    borders = np.flatnonzero(np.diff(lengths, prepend=0, append=0)) if len(lengths) else np.zeros(1, int)
    for piece, last in zip(borders[:-1].tolist(), borders[1:].tolist(), strict=True):
        length = int(lengths[piece])
        while piece < last:
            at = bisect_left(spaces, length)
            if at == len(spaces):  # nothing fits: open as many blocks as the rest of this length needs
                space = seq_len
                start = num_blocks
                stop = num_blocks = start - (piece - last) // (seq_len // length)
            else:
                space = spaces[at]
                start, stop = free[space].pop()
                if not free[space]:
                    del free[space], spaces[at]
            # The tightest block stays the tightest while one more piece fits, so it is filled up first.
            per_block = space // length
            filled = min(stop - start, (last - piece) // per_block)
            if filled:
                block_of[piece : piece + filled * per_block] = np.repeat(np.arange(start, start + filled), per_block)
                piece += filled * per_block
                release(space - per_block * length, start, start + filled)
                start += filled
            if start < stop and piece < last:  # fewer pieces are left than fit into one block
                block_of[piece:last] = start
                release(space - (last - piece) * length, start, start + 1)
                start, piece = start + 1, last
            release(space, start, stop)
    return block_of, num_blocks
