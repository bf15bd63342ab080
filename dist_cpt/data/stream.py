"""One source as a stream of blocks, read from its text: shards in a keyed order, windows in theirs, shuffled blocks.

The stream is a function of the text and the recipe. Where a shard begins in it is known once the shards before it have
been read. A mark records that, so that a resume can start reading there.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Generator, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import repeat
from pathlib import Path

from dist_cpt.data.order import FeistelOrder
from dist_cpt.data.prefetch import prefetch
from dist_cpt.data.sources import RecordTally, check_budget
from dist_cpt.data.streamed import StreamedSource, require_unchanged
from dist_cpt.data.unit_work import encode_unit
from dist_cpt.data.units import Unit, lines_before, shifted
from dist_cpt.data.windows import Window, windows_of
from dist_cpt.data.workers import cores
from dist_cpt.errors import DataError
from dist_cpt.run_folder.train_state import Mark
from dist_cpt.storage import LOGGER

BEGINNING = Mark(0, 0, 0, 0)
_MAX_THREADS = 4  # the tokenizer has its own threads


@dataclass(frozen=True)
class PlacedWindow:
    """A window and its place in the stream."""

    window: Window
    order: FeistelOrder
    mark: Mark  # of its shard
    first_block: int

    @property
    def end(self) -> int:
        return self.first_block + self.order.num_blocks


class SourceStream:
    """The blocks of one source by their number, without end: epoch follows epoch. Safe to call from several threads.

    Windows are read ahead on a thread and kept until `forget_before`. A block behind them is read again, from the
    nearest mark.
    """

    def __init__(self, source: StreamedSource, seed: int, quarantine: Path | None = None) -> None:
        """Bad records of its first epoch are kept in the folder `quarantine`, in a file for every shard."""
        self.source = source
        self.reread_tokens = 0  # of windows read only to count their blocks
        self._seed, self._quarantine = seed, quarantine
        self._lock = threading.Lock()
        self._marks = [BEGINNING]
        self._reader: Generator[PlacedWindow, None, None] | None = None
        # Contiguous, up to block `_next`; replaced as a whole, so that readers need no lock.
        self._windows: tuple[PlacedWindow, ...] = ()
        self._next = self._keep_from = 0

    def learn(self, mark: Mark) -> None:
        """Record where a shard begins, so that a resume need not read those before it."""
        with self._lock:
            self._add(mark)

    def block(self, number: int) -> tuple[PlacedWindow, int]:
        """The window with a block of the stream, and the block's number in it.

        Raises:
            DataError: a bad record under `error`, more bad records in a shard than the budget, a file that has changed
                since the start, or no document at all.
            StorageError: the text cannot be read.
        """
        placed = self._window(number)
        return placed, int(placed.order(number - placed.first_block))

    def mark_of(self, number: int) -> Mark:
        """The mark of the shard with a block; errors as `block`."""
        return self._window(number).mark

    def epochs(self, num_blocks: int) -> float:
        """How often the first blocks go through the source: in whole shards until one epoch is over, then exactly."""
        mark = self.mark_of(num_blocks)
        if mark.epoch:
            return num_blocks * mark.epoch / mark.epoch_start
        return mark.shard / len(self.source.text.units)

    def forget_before(self, number: int) -> None:
        """Allow windows that end before a block to be dropped."""
        self._keep_from = number

    def close(self) -> None:
        """Stop reading ahead; the next request opens the source again."""
        with self._lock:
            self._close()

    def _close(self) -> None:
        if self._reader is not None:
            self._reader.close()
        self._reader, self._windows = None, ()

    def _add(self, mark: Mark) -> None:
        at = bisect_right(self._marks, mark.first_block, key=lambda known: known.first_block)
        if self._marks[at - 1] != mark:
            self._marks.insert(at, mark)

    def _window(self, number: int) -> PlacedWindow:
        kept = next((placed for placed in self._windows if placed.first_block <= number < placed.end), None)
        if kept is not None:
            return kept
        with self._lock:
            nearest = self._marks[bisect_right(self._marks, number, key=lambda mark: mark.first_block) - 1]
            first = self._windows[0].first_block if self._windows else self._next
            reopened = self._reader is None or number < first or nearest.first_block > self._next
            if reopened:
                self._open(nearest)
                self._keep_from = min(self._keep_from, number)
            while self._next <= number:
                placed = self._read_on()
                if reopened and placed.end <= number:
                    self.reread_tokens += placed.window.plan.num_tokens
            if reopened and number:
                where = f"shard {nearest.shard} of epoch {nearest.epoch}"
                LOGGER.info(
                    "source %s: %d tokens read again to block %d in %s",
                    self.source.name,
                    self.reread_tokens,
                    number,
                    where,
                )
            return next(placed for placed in self._windows if number < placed.end)

    def _open(self, mark: Mark) -> None:
        self._close()
        windows, self._next = _read(self.source, self._seed, self._quarantine, mark), mark.first_block
        self._reader = prefetch(lambda _: next(windows), repeat(None), depth=1)

    def _read_on(self) -> PlacedWindow:
        """Read the next window and keep it; drop those no longer needed."""
        assert self._reader is not None
        try:
            placed = next(self._reader)
        except BaseException:
            self._close()  # the next call starts over and meets the same error
            raise
        self._add(placed.mark)
        kept = (one for one in self._windows if one.end > self._keep_from)
        self._windows, self._next = (*kept, placed), placed.end
        return placed


def _read(source: StreamedSource, seed: int, quarantine: Path | None, mark: Mark) -> Iterator[PlacedWindow]:
    """The windows from a mark on, without end; bad records of the first epoch go to `quarantine`.

    It must not refer to its stream: both would then wait for the garbage collector, which may run on a thread that is
    just starting, where waiting for the threads that read ahead never ends.
    """
    units, first, epoch, start = source.text.units, mark.first_block, mark.epoch, mark.shard
    epoch_start = mark.epoch_start
    while True:
        order = FeistelOrder(len(units), seed, f"{source.name}/shards", epoch)
        for shard in range(start, len(units)):
            mark = Mark(epoch, shard, first, epoch_start)
            unit = units[int(order(shard))]
            for number, window in enumerate(_windows(source, unit, None if epoch else quarantine)):
                name = f"{source.name}/{unit.number}/{number}"
                placed = PlacedWindow(window, FeistelOrder(window.plan.num_blocks, seed, name, epoch), mark, first)
                first = placed.end
                yield placed
        if not start and first == epoch_start:
            raise DataError(
                f"source {source.name!r}: {source.text.source.place} has no document",
                remedy="check the path and the fields that are read (data.sources[].text, .messages, classify)",
            )
        epoch, start, epoch_start = epoch + 1, 0, first


def _windows(source: StreamedSource, unit: Unit, quarantine: Path | None) -> Iterator[Window]:
    """The windows of one shard, whose files are what they were at the start."""
    text = source.text
    require_unchanged(source, unit)
    with ExitStack() as stack:
        file = None
        if text.on_bad_record == "quarantine" and quarantine is not None:
            quarantine.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context((quarantine / f"{unit.number:06d}.jsonl").open("w", encoding="ascii"))
        tally = RecordTally(text.on_bad_record, file, partial(_place, unit) if unit.is_later_part else str)
        threads = min(cores(), _MAX_THREADS)
        batches = stack.enter_context(closing(encode_unit(text, unit, tally, source.spool, threads)))
        encoded = (documents for _, documents in batches)
        yield from windows_of(encoded, source.seq_len, source.window_tokens, text.vocab_size, text.encoder.label_kind)
    require_unchanged(source, unit)
    check_budget(f"{text.name} (shard {unit.number})", tally.counts, source.bad_record_budget_fraction)


def _place(unit: Unit, where: str) -> str:
    return shifted(where, _lines_before(unit))


_lines_before = lru_cache(maxsize=64)(lines_before)
