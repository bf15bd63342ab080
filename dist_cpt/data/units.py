"""Work units: the parts of a source that are tokenised on their own, about 64 MB of text each.

They follow from the input alone, never from the number of workers, so that any process may prepare any of them and a
preparation that was killed continues with the next.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from dist_cpt.config.schema import HUB_PREFIX
from dist_cpt.data.columnar import rows_before
from dist_cpt.data.containers import Part, cuts, files_of
from dist_cpt.data.hub import HubDataset
from dist_cpt.data.store import sha256_of
from dist_cpt.storage import PatientFile, patiently

UNIT_BYTES = 64 * 2**20  # also of a file that are hashed together
_READ_BYTES = 4 * 2**20


@dataclass(frozen=True)
class Unit:
    """Whole small files, or one part of a large one, in reading order."""

    number: int
    parts: tuple[Part, ...]
    num_bytes: int  # about, for progress
    chunks: tuple[tuple[str, int, int], ...]  # (file, start, bytes) of the input that is hashed with it

    @property
    def is_later_part(self) -> bool:
        """Whether its lines, or rows, are counted from somewhere inside a file."""
        part = self.parts[0]
        return part.start > 0 and isinstance(part.path, Path) and part.path.suffix.lower() in (".jsonl", ".arrow")


def plan_units(files: Iterable[Path | HubDataset], inputs: Iterable[dict[str, Any]], unit_bytes: int) -> list[Unit]:
    """The units of a source's files, whose sizes are in `inputs`: every byte of them is in exactly one."""
    sizes = {Path(file["path"]): int(file["bytes"]) for file in inputs}
    units: list[Unit] = []
    group: list[Part] = []
    group_bytes = 0

    def close_group() -> None:
        nonlocal group, group_bytes
        if group:
            chunks = [chunk for part in group for chunk in _chunks(part.path, sizes, unit_bytes)]
            units.append(Unit(len(units), tuple(group), group_bytes, tuple(chunks)))
        group, group_bytes = [], 0

    for path in files:
        num_bytes = sum(sizes[file] for file in patiently(path, partial(files_of, path)))
        borders = patiently(path, partial(cuts, path, num_bytes, unit_bytes))
        if group_bytes + num_bytes > unit_bytes:
            close_group()
        if not borders:
            group.append(Part(path))
            group_bytes += num_bytes
            continue
        chunks = list(_chunks(path, sizes, unit_bytes))
        for number, (start, end) in enumerate(borders):
            first, last = (len(chunks) * n // len(borders) for n in (number, number + 1))
            mine = tuple(chunks[first:last])
            units.append(Unit(len(units), (Part(path, start, end),), num_bytes // len(borders), mine))
    close_group()
    return units


def plan_digest(units: Iterable[Unit]) -> str:
    """What names a division into units; equal for equal ones."""
    borders = [[[str(part.path), part.start, part.end] for part in unit.parts] for unit in units]
    return hashlib.sha256(json.dumps(borders).encode()).hexdigest()[:8]


def shifted(where: str, num_lines: int) -> str:
    """`file:line` that many lines later; the place itself if it is a whole file."""
    file, _, line = where.rpartition(":")
    return f"{file}:{int(line) + num_lines}" if line.isdecimal() else where


def lines_before(unit: Unit) -> int:
    """The number of lines of its file that start before those of a later part, or of rows before its batches."""
    (part,) = unit.parts
    num_lines, last = 0, b"\n"
    assert isinstance(part.path, Path)
    if part.path.suffix.lower() == ".arrow":
        return rows_before(part.path, part.start)
    with PatientFile(part.path) as file:
        while block := file.read(min(part.start - file.tell(), _READ_BYTES)):
            num_lines, last = num_lines + block.count(b"\n"), block
    return num_lines + (not last.endswith(b"\n"))


def _chunks(path: Path | HubDataset, sizes: dict[Path, int], unit_bytes: int) -> Iterator[tuple[str, int, int]]:
    for file in patiently(path, partial(files_of, path)):
        for start in range(0, max(sizes[file], 1), unit_bytes):  # an empty file has a hash too
            yield str(file), start, min(unit_bytes, sizes[file] - start)


def hash_chunks(chunks: Iterable[tuple[str, int, int]]) -> list[str]:
    """sha256 of each (file, start, bytes)."""
    return [sha256_of(Path(file), start, num_bytes) for file, start, num_bytes in chunks]


def hash_of_hashes(sha256s: Iterable[str]) -> str:
    """The hash of a file that is hashed in chunks."""
    return hashlib.sha256("".join(sha256s).encode()).hexdigest()


def has_content(file: dict[str, Any], recorded: dict[str, Any]) -> bool:
    """Whether a file has the content that a manifest's entry records, perhaps under another path and time."""
    if file["bytes"] != recorded["bytes"]:
        return False
    path, size, step = Path(file["path"]), file["bytes"], recorded.get("chunk_bytes")
    if file["path"].startswith(HUB_PREFIX):
        return hash_of_hashes([file["path"]]) == recorded["sha256"]  # which has the commit
    if step is None:
        return sha256_of(path, 0, size) == recorded["sha256"]
    parts = [sha256_of(path, start, min(step, size - start)) for start in range(0, size, step)]
    return hash_of_hashes(parts) == recorded["sha256"]
