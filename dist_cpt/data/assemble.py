"""Finished units -> one store: in the order of the input, so that neither workers nor kills leave a trace in it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from dist_cpt.data.sources import ReadCounts
from dist_cpt.data.store import LABEL_FILES, StoreWriter, token_dtype
from dist_cpt.data.unit_work import BAD, IDS, LABELS, LENGTHS, SourceWork
from dist_cpt.data.units import Unit, hash_of_hashes, shifted
from dist_cpt.runtime.liveness import made_progress

_BLOCK = 1 << 22  # token ids that are copied at a time


def append_units(work: SourceWork, writer: StoreWriter, on_block: Callable[[], object]) -> None:
    """Add the documents of all units in order, a few million tokens at a time however long a document is."""
    dtype, kind = token_dtype(work.vocab_size), work.encoder.label_kind
    for unit in work.units:
        folder = work.path(unit)
        lengths = np.fromfile(folder / LENGTHS, "<i4")  # all with the first block: the writer adds them up later
        with (folder / IDS).open("rb") as tokens, (folder / LABELS).open("rb") as file:
            while len(ids := np.fromfile(tokens, dtype, _BLOCK)):
                count = len(ids) if kind == "answers" else len(lengths)
                labels = None if kind is None else np.fromfile(file, LABEL_FILES[kind][1], count)
                writer.append(ids, lengths, labels)
                lengths = lengths[:0]
                made_progress()
                on_block()


def join_counts(work: SourceWork, quarantine: Path | None) -> ReadCounts:
    """The counts of all units as those of one reading; their bad records, if kept, go to `quarantine`."""
    total = ReadCounts()
    lines: dict[Any, int] = {}
    with ExitStack() as stack:
        file = None if quarantine is None else stack.enter_context(quarantine.open("w", encoding="ascii"))
        for unit in work.units:
            counts = ReadCounts(**work.finished()[unit.number]["counts"])
            before = lines.get(unit.parts[0].path, 0) if unit.is_later_part else 0
            lines[unit.parts[0].path] = before + counts.records + counts.blank_lines
            _add(total, counts, unit, before)
            if file is not None:
                file.writelines(_rows(work.path(unit) / BAD, before))
    return total


def hashed_inputs(work: SourceWork, inputs: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The source's files with a sha256 each: of the content, or of a file in several chunks that of their hashes."""
    by_file: dict[str, list[tuple[int, int, str]]] = {}
    for unit in work.units:
        for (file, start, size), sha256 in zip(unit.chunks, work.finished()[unit.number]["sha256s"], strict=True):
            by_file.setdefault(file, []).append((start, size, sha256))
    hashed = []
    for file in inputs:
        if file["path"] not in by_file:  # on the hub: its name has the commit
            hashed.append(file | {"sha256": hash_of_hashes([file["path"]])})
            continue
        (_, size, one), *others = sorted(by_file[file["path"]])
        sha256 = hash_of_hashes([one, *(sha256 for _, _, sha256 in others)]) if others else one
        hashed.append(file | {"sha256": sha256} | ({"chunk_bytes": size} if others else {}))
    return hashed


def _add(total: ReadCounts, counts: ReadCounts, unit: Unit, lines_before: int) -> None:
    for name in ("records", "blank_lines", "empty", "filtered"):
        setattr(total, name, getattr(total, name) + getattr(counts, name))
    for file, by_reason in counts.bad_by_file.items():
        for reason, number in by_reason.items():
            total.add_bad(file, reason, number)
    if counts.first_bad is not None and total.first_bad is None:
        total.first_bad = counts.first_bad
        if lines_before:
            file = str(unit.parts[0].path)
            line, _, detail = counts.first_bad.removeprefix(f"{file}:").partition(": ")
            total.first_bad = f"{shifted(f'{file}:{line}', lines_before)}: {detail}"


def _rows(path: Path, lines_before: int) -> Iterator[str]:
    with path.open(encoding="ascii") as file:
        for line in file:
            row = json.loads(line) if lines_before else {}
            yield json.dumps(row | {"where": shifted(row["where"], lines_before)}) + "\n" if lines_before else line
