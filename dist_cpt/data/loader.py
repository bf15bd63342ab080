"""Global stream positions -> batches: a pure function, so a resume is one integer on any number of ranks."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache

import numpy as np
import torch

from dist_cpt.data.batch import IGNORE_INDEX, Batch
from dist_cpt.data.mixture import Mixture
from dist_cpt.data.order import FeistelOrder
from dist_cpt.data.packing import PackingPlan, pack
from dist_cpt.data.prepare import Prepared, PreparedSource
from dist_cpt.data.store import TokenStore

PADDING = -1  # the position of no block: all padding, without any target


class BlockLoader:
    """The training stream: position -> source by weight -> epoch -> block by a keyed permutation."""

    def __init__(self, prepared: Prepared, seq_len: int, seed: int, pad_id: int) -> None:
        self.seq_len = seq_len
        self.seed = seed
        self.pad_id = pad_id
        self.source_names = [source.name for source in prepared.sources]
        self._stores = [source.store for source in prepared.sources]
        self._plans = [pack(source.store.lengths, seq_len, source.stride) for source in prepared.sources]
        self._repeats = [source.overlap_trains for source in prepared.sources]
        self.mixture = Mixture([source.weight for source in prepared.sources])
        # Neighbouring positions share their epoch; a key is derived once, not per block.
        self._order = lru_cache(maxsize=4 * len(self._stores))(self._new_order)

    @property
    def num_blocks_by_source(self) -> dict[str, int]:
        """Blocks in one epoch of each source."""
        return {name: plan.num_blocks for name, plan in zip(self.source_names, self._plans, strict=True)}

    def describe(self, position: int) -> tuple[str, int, int]:
        """(source, epoch, block within that source) at a position of the stream."""
        source, epoch, block = self._locate(position)
        return self.source_names[source], epoch, block

    def batch(self, positions: Sequence[int]) -> Batch:
        """The blocks at these positions of the global stream, in this order; PADDING gives an empty one."""
        rows = _Rows(len(positions), self.seq_len, self.pad_id, len(self._stores))
        for position in positions:
            if position == PADDING:
                rows.add_padding()
                continue
            source, _, block = self._locate(position)
            rows.add(self._stores[source], self._plans[source], block, source, self._repeats[source])
        return rows.batch(positions)

    def _locate(self, position: int) -> tuple[int, int, int]:
        sources, indices = self.mixture(position)
        source = int(sources)
        epoch, index = divmod(int(indices), self._plans[source].num_blocks)
        return source, epoch, int(self._order(source, epoch)(index))

    def _new_order(self, source: int, epoch: int) -> FeistelOrder:
        return FeistelOrder(self._plans[source].num_blocks, self.seed, self.source_names[source], epoch)


class ValidationLoader:
    """One held-out set: the same blocks in the same order for every run, seed and world size."""

    def __init__(self, source: PreparedSource, seq_len: int, pad_id: int, max_blocks: int | None = None) -> None:
        self.name = source.name
        self.role = source.role
        self.seq_len = seq_len
        self.pad_id = pad_id
        self._store = source.store
        self._plan = pack(source.store.lengths, seq_len, source.stride)
        self._repeats = source.overlap_trains
        # Packing puts long documents first; a sample of max_blocks must not be of long documents only.
        self._order = FeistelOrder(self._plan.num_blocks, 0, source.name)
        self.num_blocks = min(self._plan.num_blocks, max_blocks or self._plan.num_blocks)

    def batch(self, indices: Sequence[int]) -> Batch:
        """The blocks at these indices; one at or above num_blocks is all padding, without any target."""
        rows = _Rows(len(indices), self.seq_len, self.pad_id, 1)
        for index in indices:
            if index < self.num_blocks:
                rows.add(self._store, self._plan, int(self._order(index)), 0, self._repeats)
            else:
                rows.add_padding()
        return rows.batch(indices)


def prefetch(
    make: Callable[[Sequence[int]], Batch], positions: Iterable[Sequence[int]], depth: int = 2
) -> Iterator[Batch]:
    """Yield make(p) for each p in order, up to `depth` batches ahead on one thread; errors surface here."""
    pending: deque[Future[Batch]] = deque()
    pool = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
    try:
        for wanted in positions:
            pending.append(pool.submit(make, wanted))
            if len(pending) > depth:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


class _Rows:
    """Fills the arrays of a batch block by block. B blocks of L tokens."""

    def __init__(self, num_blocks: int, seq_len: int, pad_id: int, num_sources: int) -> None:
        self.seq_len = seq_len
        self.input_ids = np.full((num_blocks, seq_len), pad_id, dtype=np.int64)
        self.labels = np.full((num_blocks, seq_len), IGNORE_INDEX, dtype=np.int64)
        self.position_ids = np.empty((num_blocks, seq_len), dtype=np.int64)
        self.ramp = np.arange(seq_len, dtype=np.int64)
        self.borders = [0]
        self.tokens_by_source = np.zeros(num_sources, dtype=np.int64)
        self.num_targets = 0
        self.row = 0

    def add(self, store: TokenStore, plan: PackingPlan, block: int, source: int, repeats: bool) -> None:
        """One block; `repeats`: what an earlier piece has predicted is a target again."""
        first, last = plan.block_offsets[block : block + 2].tolist()
        at = 0
        for piece in range(first, last):
            document = plan.piece_document[piece]
            length = int(plan.piece_length[piece])
            start = int(plan.piece_start[piece])
            # One token more than the piece, where the document goes on: the last target of a split piece.
            stop = min(start + length + 1, int(store.lengths[document]))
            origin = int(store.starts[document])
            tokens = store.tokens[origin + start : origin + stop]
            self.input_ids[self.row, at : at + length] = tokens[:length]
            self.position_ids[self.row, at : at + length] = self.ramp[:length]
            labels = self.labels[self.row, at : at + length]
            if store.classes is None:
                answers = None if store.answers is None else store.answers[origin + start + 1 : origin + stop]
                self.num_targets += _next_tokens(labels, tokens[1:], answers)
                if start and plan.overlap and not repeats:
                    self.num_targets -= int((labels[: plan.overlap] != IGNORE_INDEX).sum())
                    labels[: plan.overlap] = IGNORE_INDEX
            elif start + length == store.lengths[document]:
                labels[-1] = store.classes[document]
                self.num_targets += 1
            at += length
            self.borders.append(self.row * self.seq_len + at)
        self.tokens_by_source[source] += at
        self._finish_row(at)

    def add_padding(self) -> None:
        self._finish_row(0)

    def _finish_row(self, at: int) -> None:
        if at < self.seq_len:
            self.position_ids[self.row, at:] = self.ramp[: self.seq_len - at]
            self.borders.append((self.row + 1) * self.seq_len)
        self.row += 1

    def batch(self, block_ids: Sequence[int]) -> Batch:
        borders = np.array(self.borders, dtype=np.int32)
        return Batch(
            torch.from_numpy(self.input_ids),
            torch.from_numpy(self.labels),
            torch.from_numpy(self.position_ids),
            torch.from_numpy(borders),
            int(np.diff(borders).max(initial=0)),
            self.num_targets,
            self.tokens_by_source,
            tuple(int(b) for b in block_ids),
        )


def _next_tokens(labels: np.ndarray, following: np.ndarray, answers: np.ndarray | None) -> int:
    """Write the targets `following` into `labels`, those alone that are part of an answer; return their number."""
    if answers is None:
        labels[: len(following)] = following
        return len(following)
    trains = answers.astype(bool)
    labels[: len(following)][trains] = following[trains]
    return int(trains.sum())
