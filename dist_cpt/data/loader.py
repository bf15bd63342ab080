"""Global stream positions -> batches: a pure function, so that a resume on any number of ranks needs one integer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch

from dist_cpt.data.batch import IGNORE_INDEX, Batch
from dist_cpt.data.mixture import mixture_of
from dist_cpt.data.order import FeistelOrder
from dist_cpt.data.packing import PackingPlan, document_lengths, pack
from dist_cpt.data.prepared import Prepared, PreparedSource
from dist_cpt.run_folder.train_state import Mark

PADDING = -1  # the position of a block of padding, without any target


class Tokens(Protocol):
    """Documents of token ids in a row, with their labels if there are any: a store, or a part of a stream."""

    @property
    def tokens(self) -> np.ndarray: ...
    @property
    def lengths(self) -> np.ndarray: ...
    @property
    def answers(self) -> np.ndarray | None: ...  # by token
    @property
    def classes(self) -> np.ndarray | None: ...  # by document
    def start_of(self, document: int) -> int: ...


@dataclass(frozen=True)
class PackedTokens:
    """The blocks of some documents."""

    store: Tokens
    plan: PackingPlan
    overlap_trains: bool  # whether a token in two overlapping pieces is a target in both


class BlockLoader:
    """The training stream: position -> source by weight -> epoch -> block by a keyed permutation."""

    def __init__(self, prepared: Prepared, seq_len: int, seed: int, pad_id: int) -> None:
        self.source_names = [source.name for source in prepared.sources]
        self.first_position = 0  # of a block that can be read without reading others
        self._seq_len = seq_len
        self._seed = seed
        self._pad_id = pad_id
        self._packed = [_pack_source(source, seq_len) for source in prepared.sources]
        self.sizes = [(packed.plan.num_blocks, packed.plan.num_tokens) for packed in self._packed]  # by source
        self.available = [blocks for blocks, _ in self.sizes]
        self.mixture = mixture_of(prepared, self.sizes)
        # Neighbouring positions share their epoch: its keys are derived once, not per block.
        self._order = lru_cache(maxsize=4 * len(self._packed))(self._new_order)

    def with_data(self, prepared: Prepared) -> BlockLoader:
        """The stream of other sources or weights, with the same seed and length."""
        return BlockLoader(prepared, self._seq_len, self._seed, self._pad_id)

    def describe(self, position: int) -> tuple[str, int, int]:
        """(source, epoch, block within that source) at a position of the stream."""
        source, epoch, block = self._locate(position)
        return self.source_names[source], epoch, block

    def block_id(self, position: int) -> tuple[int, int, int]:
        """What names the block at a position of the stream: (source, epoch, block within that source)."""
        return self._locate(position)

    def document_lengths(self, position: int) -> list[int]:
        """Tokens of each document in the block at a position of the stream; its padding is one more."""
        source, _, block = self._locate(position)
        return document_lengths(self._packed[source].plan, block)

    def batch(self, positions: Sequence[int]) -> Batch:
        """The blocks at these positions of the global stream, in this order; PADDING yields an empty block."""
        builder = BatchBuilder(len(positions), self._seq_len, self._pad_id, len(self._packed))
        for position in positions:
            if position == PADDING:
                builder.add_padding()
            else:
                source, _, block = self._locate(position)
                builder.add(self._packed[source], block, source)
        return builder.build(positions)

    def blocks_read(self, num_blocks: int) -> dict[str, int]:
        """How many of the first `num_blocks` of the stream are of each source."""
        return dict(zip(self.source_names, self.mixture.counts_before(num_blocks).tolist(), strict=True))

    def epochs(self, num_blocks: int) -> dict[str, float]:
        """How often the first `num_blocks` of the stream go through each source."""
        read = self.blocks_read(num_blocks).items()
        return {name: count / available for (name, count), available in zip(read, self.available, strict=True)}

    def epochs_read(self, position: int) -> None:
        """None: the counts of blocks tell."""

    def marks(self, position: int) -> None:
        """None: a resume finds every block by its number."""

    def learn(self, marks: Mapping[str, Mark]) -> None:
        """Nothing to record, as `marks`."""

    def forget_before(self, position: int) -> None:
        """Nothing is kept."""

    def close(self) -> None:
        """Nothing is read ahead."""

    def _locate(self, position: int) -> tuple[int, int, int]:
        source, number = self.mixture(position)
        epoch, index = divmod(number, self.available[source])
        return source, epoch, int(self._order(source, epoch)(index))

    def _new_order(self, source: int, epoch: int) -> FeistelOrder:
        return FeistelOrder(self.available[source], self._seed, self.source_names[source], epoch)


class ValidationLoader:
    """One held-out set: the same blocks in the same order for every run, seed and world size."""

    def __init__(self, source: PreparedSource, seq_len: int, pad_id: int, max_blocks: int | None = None) -> None:
        self.name = source.name
        self.role = source.role
        self._seq_len = seq_len
        self._pad_id = pad_id
        self._packed = _pack_source(source, seq_len)
        available = self._packed.plan.num_blocks
        # Packing puts long documents first; a sample of max_blocks should not consist of long documents.
        self._order = FeistelOrder(available, 0, source.name)
        self.num_blocks = min(available, max_blocks or available)

    @property
    def tokens(self) -> np.ndarray:
        """The token ids of the whole set, document after document."""
        return self._packed.store.tokens

    def batch(self, indices: Sequence[int]) -> Batch:
        """The blocks at these indices; one at or above num_blocks is padding, without any target."""
        builder = BatchBuilder(len(indices), self._seq_len, self._pad_id, 1)
        for index in indices:
            if index < self.num_blocks:
                builder.add(self._packed, int(self._order(index)), 0)
            else:
                builder.add_padding()
        return builder.build(indices)


def _pack_source(source: PreparedSource, seq_len: int) -> PackedTokens:
    plan = source.blocks.plan if source.blocks else pack(source.store.lengths, seq_len, source.stride, source.excluded)
    if plan.seq_len != seq_len:
        raise ValueError(f"blocks of {plan.seq_len} tokens, expected {seq_len}")
    return PackedTokens(source.store, plan, source.overlap_trains)


class BatchBuilder:
    """Fills the arrays of a batch block by block. B blocks of L tokens."""

    def __init__(self, num_blocks: int, seq_len: int, pad_id: int, num_sources: int) -> None:
        self._seq_len = seq_len
        self._input_ids = np.full((num_blocks, seq_len), pad_id, dtype=np.int64)
        self._labels = np.full((num_blocks, seq_len), IGNORE_INDEX, dtype=np.int64)
        self._position_ids = np.empty((num_blocks, seq_len), dtype=np.int64)
        self._ramp = np.arange(seq_len, dtype=np.int64)
        self._borders = [0]
        self._counts_by_source = np.zeros((num_sources, 3), dtype=np.int64)
        self._num_targets = 0
        self._row = 0

    def add(self, packed: PackedTokens, block: int, source: int) -> None:
        """Append one block of source number `source`."""
        store, plan = packed.store, packed.plan
        filled, targets_before = 0, self._num_targets
        for document, start, length in plan.block(block):
            # One token beyond the piece, where the document continues: the last target of a split piece.
            stop = min(start + length + 1, int(store.lengths[document]))
            origin = store.start_of(document)
            tokens = store.tokens[origin + start : origin + stop]
            self._input_ids[self._row, filled : filled + length] = tokens[:length]
            self._position_ids[self._row, filled : filled + length] = self._ramp[:length]
            labels = self._labels[self._row, filled : filled + length]
            if store.classes is None:
                answers = None if store.answers is None else store.answers[origin + start + 1 : origin + stop]
                self._num_targets += _set_next_tokens(labels, tokens[1:], answers)
                if start and plan.overlap and not packed.overlap_trains:  # targets of the previous piece
                    self._num_targets -= int((labels[: plan.overlap] != IGNORE_INDEX).sum())
                    labels[: plan.overlap] = IGNORE_INDEX
            elif start + length == store.lengths[document]:
                labels[-1] = store.classes[document]
                self._num_targets += 1
            filled += length
            self._borders.append(self._row * self._seq_len + filled)
        self._counts_by_source[source] += (1, filled, self._num_targets - targets_before)
        self._finish_row(filled)

    def add_padding(self) -> None:
        self._finish_row(0)

    def _finish_row(self, filled: int) -> None:
        if filled < self._seq_len:
            self._position_ids[self._row, filled:] = self._ramp[: self._seq_len - filled]
            self._borders.append((self._row + 1) * self._seq_len)
        self._row += 1

    def build(self, block_ids: Sequence[int]) -> Batch:
        borders = np.array(self._borders, dtype=np.int32)
        return Batch(
            torch.from_numpy(self._input_ids),
            torch.from_numpy(self._labels),
            torch.from_numpy(self._position_ids),
            torch.from_numpy(borders),
            int(np.diff(borders).max(initial=0)),
            self._num_targets,
            self._counts_by_source,
            tuple(int(b) for b in block_ids),
        )


def _set_next_tokens(labels: np.ndarray, following: np.ndarray, answers: np.ndarray | None) -> int:
    """Write the targets `following` into `labels`, only those in an answer if given; return their number."""
    if answers is None:
        labels[: len(following)] = following
        return len(following)
    is_target = answers.astype(bool)
    labels[: len(following)][is_target] = following[is_target]
    return int(is_target.sum())
