"""One source as a folder of units: any number of processes tokenise them, one of them puts them together.

The folder has a folder per finished unit, named by its number, and the claims on the others. Nothing of it carries the
name of a store's file until all units are there.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dist_cpt.data.claims import Claim, claim, progress_of
from dist_cpt.data.cut_text import Cutter, Piece
from dist_cpt.data.encode import Encoded, Encoder, Source
from dist_cpt.data.long_text import LongText
from dist_cpt.data.prefetch import prefetch
from dist_cpt.data.sources import OnBadRecord, Record, RecordTally, SourceFiles, is_template, read_records
from dist_cpt.data.store import LABEL_FILES, LabelKind, largest_id, token_dtype
from dist_cpt.data.units import Unit, hash_chunks, lines_before, shifted
from dist_cpt.run_folder.json_files import fsync_path
from dist_cpt.runtime.liveness import made_progress
from dist_cpt.storage import is_there, patiently, read_bytes

BATCH_BYTES = 1 << 19  # of records per call of the tokenizer; bounds memory
BATCH_RECORDS = 8192
IDS, LENGTHS, LABELS, BAD, _DONE = "ids", "lengths", "labels", "bad", "unit.json"

OnBatch = Callable[[], object]


@dataclass(frozen=True)
class SourceUnits:
    """One source as units, and what turns their records into tokens."""

    name: str
    source: Source
    files: SourceFiles
    units: list[Unit]
    encoder: Encoder
    vocab_size: int
    on_bad_record: OnBadRecord


@dataclass(frozen=True)
class SourceWork(SourceUnits):
    """A source whose units are tokenised into files: where, and which are finished."""

    folder: Path
    store: Path  # that they become
    _finished: dict[int, dict[str, Any]] = field(default_factory=dict)

    def path(self, unit: Unit) -> Path:
        """The folder of a finished unit."""
        return self.folder / _name(unit)

    def finished(self) -> dict[int, dict[str, Any]]:
        """What is recorded of every finished unit, by number."""
        try:
            names = set(patiently(self.folder, lambda: os.listdir(self.folder)))
        except FileNotFoundError:
            return {}
        for unit in self.units:
            if unit.number not in self._finished and _name(unit) in names:
                self._finished[unit.number] = json.loads(read_bytes(self.path(unit) / _DONE, expected=True))
        return self._finished

    def is_finished(self) -> bool:
        """Whether all units are there."""
        return len(self.finished()) == len(self.units)

    def progress(self) -> tuple[int, int]:
        """(bytes, tokens) that all processes together have done so far."""
        finished, claims = self.finished(), progress_of(self.folder)
        rows = [(unit.num_bytes, finished[unit.number]["tokens"]) for unit in self.units if unit.number in finished]
        for unit in self.units:
            if unit.number not in finished and (beat := claims.get(_name(unit))):
                rows.append((min(beat[0], unit.num_bytes), beat[1]))
        return sum(row[0] for row in rows), sum(row[1] for row in rows)


def _name(unit: Unit) -> str:
    return f"{unit.number:06d}"


def take_units(work: SourceWork, threads: int, on_batch: OnBatch) -> bool:
    """Tokenise every unit that no living process has; whether all of the source are finished then.

    Raises:
        DataError: a bad record under `error`, or a file that cannot be read as its format.
        OSError: the folder cannot be written.
    """
    work.folder.mkdir(parents=True, exist_ok=True)
    taken = True
    while taken:
        finished, taken = work.finished(), False
        for unit in [unit for unit in work.units if unit.number not in finished]:
            held = claim(work.folder, _name(unit))
            if held is None:
                continue
            with held:
                if is_there(work.store):  # another process finished it, and this folder was made again
                    return True
                if not is_there(work.path(unit)):
                    _make_unit(work, unit, held, threads, on_batch)
                    taken = True
    return work.is_finished()


def _make_unit(work: SourceWork, unit: Unit, held: Claim, threads: int, on_batch: OnBatch) -> None:
    target = work.path(unit)
    making = target.with_name(f"{target.name}.{held.token}")
    making.mkdir()
    try:
        _write_unit(making, work, unit, held, threads, on_batch)
        making.rename(target)
    except OSError:  # another process took this unit for abandoned and made the same
        if not is_there(target):
            raise
    finally:  # also on Ctrl-C; after the rename there is nothing left to remove
        shutil.rmtree(making, ignore_errors=True)
    fsync_path(work.folder)


def _write_unit(making: Path, work: SourceWork, unit: Unit, held: Claim, threads: int, on_batch: OnBatch) -> None:
    with ExitStack() as stack:
        writer = stack.enter_context(closing(_UnitWriter(making, work.vocab_size, work.encoder.label_kind)))
        quarantine = None
        if work.on_bad_record == "quarantine":
            quarantine = stack.enter_context((making / BAD).open("w", encoding="ascii"))
        tally = RecordTally(work.on_bad_record, quarantine, partial(_place_in_file, unit, work.on_bad_record))
        num_texts = num_bytes = 0
        batches = stack.enter_context(closing(encode_unit(work, unit, tally, making, threads)))
        for batch, encoded in batches:
            writer.append(encoded)
            num_texts += sum(map(_ends_here, batch)) - len(encoded.rejected)
            num_bytes += sum(map(_num_bytes, batch))
            held.beat(num_bytes, writer.num_tokens)
            on_batch()
        writer.finish()
        done = {"sha256s": hash_chunks(unit.chunks), "counts": asdict(tally.counts), "texts": num_texts}
        done |= {"documents": writer.num_documents, "tokens": writer.num_tokens}
    (making / _DONE).write_text(json.dumps(done))
    for path in (*making.iterdir(), making):
        fsync_path(path)


def encode_unit(
    units: SourceUnits, unit: Unit, tally: RecordTally, spool: Path, threads: int
) -> Generator[tuple[list[Record[Any]], Encoded], None, None]:
    """The records of one unit in batches, each with its documents; bad ones go to `tally`, texts too long for memory
    to files without a name in `spool`.

    Raises:
        DataError: a bad record under `error`, or a file that cannot be read as its format.
        StorageError: the file system does not answer.
    """
    cutter = units.encoder.cutter
    long = None if cutter is None or is_template(units.source.text) else spool
    records = read_records(units.name, units.files, units.encoder.parser(units.source), tally, unit.parts, long)
    batches = prefetch(lambda batch: (batch, units.encoder(batch)), _batches(records, cutter), threads, threads)
    with closing(batches):
        for batch, encoded in batches:
            for record, bad in encoded.rejected:
                tally.reject(bad, record.origin)
            made_progress()
            yield batch, encoded


def _batches(records: Iterator[Record[Any]], cutter: Cutter | None) -> Iterator[list[Record[Any]]]:
    """Records for one call of the tokenizer each; the pieces of a long text come one at a time."""
    batch: list[Record[Any]] = []
    num_bytes = 0
    for record in records:
        parts = None if cutter is None else _parts_of_long(record.value, cutter)
        if parts is not None or num_bytes >= BATCH_BYTES or len(batch) == BATCH_RECORDS:
            if batch:
                yield batch
            batch, num_bytes = [], 0
        if cutter is not None and parts is not None:
            for piece in cutter.pieces(parts):
                yield [Record(piece, record.origin)]
            continue
        batch.append(record)
        num_bytes += record.origin.num_bytes
    if batch:
        yield batch


def _parts_of_long(value: Any, cutter: Cutter) -> Iterable[str] | None:
    if isinstance(value, LongText):
        return value.parts()
    return [value] if isinstance(value, str) and cutter.is_long(value) else None


def _ends_here(record: Record[Any]) -> bool:
    return record.value.last if isinstance(record.value, Piece) else True


def _num_bytes(record: Record[Any]) -> int:
    return len(record.value.text) if isinstance(record.value, Piece) else record.origin.num_bytes


def _place_in_file(unit: Unit, on_bad_record: OnBadRecord, where: str) -> str:
    """A line's number in the file, for an error that ends the work; else units are counted when they are joined."""
    return shifted(where, lines_before(unit)) if on_bad_record == "error" and unit.is_later_part else where


class _UnitWriter:
    """The documents of one unit as they are encoded: ids, lengths and labels, without an index."""

    def __init__(self, folder: Path, vocab_size: int, label_kind: LabelKind | None) -> None:
        self.num_documents = self.num_tokens = 0
        self._vocab_size, self._dtype = vocab_size, token_dtype(vocab_size)
        self._label_dtype = None if label_kind is None else LABEL_FILES[label_kind][1]
        self._last = np.zeros(1, "<i4")[0]  # the length of the last document
        with ExitStack() as opened:  # a file that cannot be opened or closed leaves none of the others open
            names = (IDS, LENGTHS, LABELS)
            self._files = {name: opened.enter_context((folder / name).open("wb")) for name in names}
            self._opened = opened.pop_all()

    def append(self, encoded: Encoded) -> None:
        """Add documents.

        Raises:
            DataError: an id outside the vocabulary.
        """
        ids = encoded.ids
        if not len(ids):
            return
        largest_id(ids, self._vocab_size)
        self._files[IDS].write(np.ascontiguousarray(ids, dtype=self._dtype).data)
        lengths = encoded.lengths.astype("<i4")
        if encoded.continues:
            lengths[0] += self._last
        elif self.num_documents:
            self._files[LENGTHS].write(self._last.tobytes())
        self._last = lengths[-1]  # may grow
        self._files[LENGTHS].write(lengths[:-1].tobytes())
        if encoded.labels is not None and self._label_dtype is not None:
            self._files[LABELS].write(np.ascontiguousarray(encoded.labels, dtype=self._label_dtype).data)
        self.num_documents += len(lengths) - encoded.continues
        self.num_tokens += len(ids)

    def finish(self) -> None:
        """No document grows any more."""
        if self.num_documents:
            self._files[LENGTHS].write(self._last.tobytes())

    def close(self) -> None:
        """Close the files, finished or not."""
        self._opened.close()
