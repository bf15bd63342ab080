"""The files that hold records: which formats are read, how each is opened, and where one is divided.

A format is known by the end of the file's name, a compression by what follows it: `a.jsonl`, `a.parquet`,
`a.csv.gz`, `a.tar.zst`. The members of a tar archive are files of these formats again. Records come in the order of
the file, and every one becomes a text (bytes), an object (a dictionary) or, from Megatron-LM's files, token ids.
"""

from __future__ import annotations

import bz2
import csv
import fnmatch
import gzip
import io
import lzma
import stat
import struct
import tarfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import numpy as np

from dist_cpt.data.columnar import read_arrow, read_parquet, read_saved_dataset, record_batches, row_groups
from dist_cpt.data.hub import HubDataset, open_stream, rows
from dist_cpt.data.megatron import MegatronPair
from dist_cpt.data.records import BadRecord, Limits, RawRecord, Records
from dist_cpt.data.text_formats import READ_BYTES, lines_from, read_csv, read_json, read_lines, read_text
from dist_cpt.errors import DataError
from dist_cpt.storage import PatientFile, patiently

# What the formats' libraries raise on bytes of another format; pyarrow raises the built-in errors.
_DAMAGE = (
    *(EOFError, ValueError, LookupError, TypeError, NotImplementedError, RecursionError, OverflowError),
    *(zlib.error, lzma.LZMAError, tarfile.TarError, csv.Error, struct.error),
)
Read = Callable[[BinaryIO, str, Limits], Records]  # (stream, name for messages, limits)


@dataclass(frozen=True)
class Part:
    """The range [start, end) of a file to read: lines by the byte they start at, row groups, record batches, or shards
    of a hub data set. Without an end it is the whole file."""

    path: Path | HubDataset
    start: int = 0
    end: int | None = None


def suffix_of(name: str) -> str | None:
    """The end of a file's name that says how it is read, such as `.jsonl.gz`; None for a file that is not read."""
    lower = name.lower()
    for compression in ("", *_OPEN):
        for format_ in _FORMATS:
            if lower.endswith(format_ + compression):
                return format_ + compression
    return None


def files_of(path: Path | HubDataset) -> list[Path]:
    """The files whose change is a change of `path`: of a saved data set all, of Megatron-LM's index the pair, of a data
    set on the hub none, for its commit says it."""
    if isinstance(path, HubDataset):
        return []
    if path.is_dir():
        return sorted(file for file in path.rglob("*") if file.is_file())
    return [path, path.with_suffix(".bin")] if path.suffix.lower() == ".idx" else [path]


def cuts(path: Path | HubDataset, num_bytes: int, unit_bytes: int) -> list[tuple[int, int]]:
    """Where a file is divided into parts of about `unit_bytes`, by its size and format alone; [] if it is read whole.

    Lines of jsonl can be found from any byte on, as can row groups of parquet and record batches of an Arrow file. Of
    a compressed file, an array, rows with quoted line breaks or an archive no part can be read without all before it.
    """
    if isinstance(path, HubDataset):
        return [(number, number + 1) for number in range(open_stream(path).num_shards)]
    if num_bytes <= unit_bytes or (suffix := suffix_of(path.name)) not in _PARTS:
        return []
    if suffix == ".jsonl":
        starts = range(0, num_bytes, unit_bytes)
        return [(start, min(start + unit_bytes, num_bytes)) for start in starts]
    return row_groups(path, unit_bytes) if suffix == ".parquet" else record_batches(path, unit_bytes)


def read_container(
    part: Part, ignore: Sequence[str] = (), split: str | None = None, limits: Limits | None = None
) -> Records:
    """The records of one file or a part of it, of a folder that `datasets` saved, or of a data set on the hub; None
    stands for a blank line.

    Lines are counted from the part's first. A file that is cut off, damaged or not what its name says ends with a bad
    record.

    Raises:
        DataError: an archive has a file that is not read and that `ignore` does not name.
        StorageError: the file system does not answer.
        OSError: no such file, or not a regular one.
    """
    path, limits = part.path, limits or Limits()
    if isinstance(path, HubDataset):
        stream = open_stream(path)
        for shard in range(stream.num_shards)[part.start : part.end]:  # damage in one hides no other
            yield from _until_damage((RawRecord(*placed) for placed in rows(path, stream, shard)), f"{path}/{shard}")
    elif stat.S_ISDIR(patiently(path, path.stat).st_mode):
        yield from read_saved_dataset(path, split)
    elif part.end is not None:
        with io.BufferedReader(PatientFile(path), READ_BYTES) as file:
            read = _PARTS[path.suffix.lower()]
            yield from _until_damage(read(file, str(path), limits, part.start, part.end), str(path))
    elif path.suffix.lower() == ".idx":
        yield from _until_damage(_megatron(path), str(path))
    else:
        with io.BufferedReader(PatientFile(path), READ_BYTES) as file:
            yield from _read(file, path.name, str(path), ignore, limits)


def _read(stream: BinaryIO, name: str, where: str, ignore: Sequence[str], limits: Limits) -> Records:
    suffix = suffix_of(name)
    assert suffix is not None  # the caller has asked
    format_ = next(known for known in _FORMATS if suffix.startswith(known))
    opened = stream if suffix == format_ else _OPEN[suffix.removeprefix(format_)](stream)
    if format_ == ".tar":
        records = _archive(opened, where, ignore, limits)
    else:
        records = _READ[format_](opened, where, limits)
    yield from _until_damage(records, where)


def _until_damage(records: Records, where: str) -> Records:
    try:
        yield from records
    except BadRecord as bad:
        yield RawRecord(where, b"", bad=bad)
    except (*_DAMAGE, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # gzip, bz2 and pyarrow raise it without a number
            raise
        detail = f"the rest of the file is damaged or cut off ({error})".replace("\n", " ")
        yield RawRecord(where, b"", bad=BadRecord("damaged_file", detail))


def _archive(stream: BinaryIO, where: str, ignore: Sequence[str], limits: Limits) -> Records:
    with tarfile.open(fileobj=stream, mode="r|") as archive:
        for member in archive:
            name = PurePosixPath(member.name)
            if not member.isfile() or any(part.startswith(".") for part in name.parts if part != "."):
                continue
            if is_ignored(member.name, ignore):
                continue
            place = f"{where}/{member.name}"
            if suffix_of(name.name) is None:
                raise DataError(f"{place} is not read", remedy=f"name it in the source's ignore, or use {FORMATS}")
            content = archive.extractfile(member)
            assert content is not None  # of a regular file
            yield from _read(io.BytesIO(content.read()), name.name, place, ignore, limits)


def _megatron(index: Path) -> Records:
    """The documents of a .bin/.idx pair as int64 ids."""
    try:
        pair = MegatronPair(index)
    except ValueError as error:
        raise BadRecord("damaged_file", str(error)) from None
    for number in range(pair.num_documents):
        try:
            ids = pair.document(number)
        except ValueError as error:
            raise BadRecord("damaged_file", str(error)) from None
        yield RawRecord(f"{index}:{number + 1}", ids.astype(np.int64))


def is_ignored(name: str, ignore: Sequence[str]) -> bool:
    """Whether a pattern of `ignore` matches the path `name` or its last part."""
    return any(fnmatch.fnmatch(part, pattern) for pattern in ignore for part in (name, PurePosixPath(name).name))


def _zstd(stream: BinaryIO) -> BinaryIO:
    import pyarrow as pa

    return io.BufferedReader(pa.CompressedInputStream(stream, "zstd"))  # type: ignore[arg-type]


_OPEN: dict[str, Callable[[BinaryIO], Any]] = {
    ".gz": lambda stream: gzip.GzipFile(fileobj=stream),
    ".zst": _zstd,
    ".xz": lzma.LZMAFile,
    ".bz2": bz2.BZ2File,
}
_READ: dict[str, Read] = {
    ".jsonl": read_lines,
    ".json": read_json,
    ".txt": read_text,
    ".md": read_text,
    ".csv": read_csv,
    ".tsv": read_csv,
    ".parquet": read_parquet,
    ".arrow": read_arrow,
}
_PARTS = {".jsonl": lines_from, ".parquet": read_parquet, ".arrow": read_arrow}  # that are read in parts too
_FORMATS = (*_READ, ".tar", ".idx")
FORMATS = f"{', '.join(_FORMATS)}, each also with {', '.join(_OPEN)}"
