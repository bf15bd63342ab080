"""The files that hold records: which formats are read, how each is opened, and how it yields its records.

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
import json
import lzma
import stat
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import numpy as np

from dist_cpt.config.schema import MAX_RECORD_BYTES
from dist_cpt.data.hub import HubDataset, open_stream, rows
from dist_cpt.data.long_text import LONG_BYTES, LongLine, LongText, TextSpool
from dist_cpt.data.megatron import MegatronPair
from dist_cpt.errors import DataError
from dist_cpt.storage import PatientFile, is_there, patiently

Fields = dict[str, Any]
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_READ_BYTES = 1 << 20
# What the formats' libraries raise on bytes of another format; pyarrow raises the built-in errors.
_DAMAGE = (
    *(EOFError, ValueError, LookupError, TypeError, NotImplementedError, RecursionError, OverflowError),
    *(zlib.error, lzma.LZMAError, tarfile.TarError, csv.Error, struct.error),
)
_ROWS = 1024  # of a columnar file that are Python objects at a time


class BadRecord(Exception):
    """One invalid record: `reason` is the key it is counted under, `detail` the message."""

    def __init__(self, reason: str, detail: str) -> None:
        self.reason = reason
        self.detail = detail
        super().__init__(detail)


@dataclass(frozen=True)
class RawRecord:
    """One record as its file holds it. `where` is `file`, `file:line` or `file:row`, counted from 1."""

    where: str
    content: bytes | Fields | np.ndarray | LongText  # a text or a line of JSON, an object, or token ids
    is_text: bool = False
    bad: BadRecord | None = None  # why the record cannot be read

    def fields(self) -> Fields:
        """The record's object; BadRecord if it is a text or not a valid object."""
        if self.bad is not None:
            raise self.bad
        if isinstance(self.content, dict):
            return self.content
        if self.is_text or not isinstance(self.content, bytes):
            raise BadRecord("no_fields", "a file of text or tokens has no fields")
        return json_object(self.content)

    @property
    def raw(self) -> bytes:
        """The bytes to keep of a bad record: those of the file, an object as JSON, or the beginning of a long text."""
        if isinstance(self.content, dict):
            return json.dumps(self.content, default=str).encode()
        if isinstance(self.content, LongText):
            return str(self.content).encode()
        return self.content if isinstance(self.content, bytes) else self.content.tobytes()

    @property
    def num_bytes(self) -> int:
        """About what the record takes in memory."""
        if isinstance(self.content, dict):
            return sum(len(value) for value in self.content.values() if isinstance(value, str | LongText))
        return self.content.nbytes if isinstance(self.content, np.ndarray) else len(self.content)


def json_object(raw: bytes) -> Fields:
    """The object on one line of jsonl; BadRecord if it is not valid UTF-8, not JSON, or not an object."""
    try:
        record: Any = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise _not_json(error) from None
    return _object(record)


def _not_json(error: ValueError | RecursionError, *, in_piece: bool = False) -> BadRecord:
    if isinstance(error, UnicodeDecodeError):  # a piece of a long line does not know where it begins
        place = "in" if in_piece else f"at byte {error.start} of"
        return BadRecord("invalid_utf8", f"invalid UTF-8 {place} the line")
    return BadRecord("bad_json", f"not valid JSON ({error})")


def _object(value: Any) -> Fields:
    if not isinstance(value, dict):
        raise BadRecord("bad_json", f"a JSON {type(value).__name__}, not an object")
    return value


@dataclass(frozen=True)
class Part:
    """The range [start, end) of a file to read: lines by the byte they start at, row groups, or shards of a hub data
    set. Without an end it is the whole file."""

    path: Path | HubDataset
    start: int = 0
    end: int | None = None


@dataclass(frozen=True)
class Limits:
    """How large a record may be, and where texts too long for memory may be kept; None: every record is in memory."""

    max_record_bytes: int = MAX_RECORD_BYTES
    spool: Path | None = None

    def too_large(self, num_bytes: int) -> BadRecord:
        """The reason of a larger record."""
        return BadRecord("too_large", f"{num_bytes} bytes, more than data.max_record_bytes {self.max_record_bytes}")


Records = Iterator[RawRecord | None]  # None: a blank line
Read = Callable[[BinaryIO, str, Limits], Records]  # (stream, name for messages, limits)


def suffix_of(name: str) -> str | None:
    """The end of a file's name that says how it is read, such as `.jsonl.gz`; None for a file that is not read."""
    lower = name.lower()
    for compression in ("", *_OPEN):
        for format_ in _FORMATS:
            if lower.endswith(format_ + compression):
                return format_ + compression
    return None


def is_dataset_folder(folder: Path) -> bool:
    """Whether `datasets` saved a data set, or one per split, in this folder."""
    is_one = is_there(folder / "dataset_info.json") and any(folder.glob("*.arrow"))
    return is_one or is_there(folder / "dataset_dict.json")


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

    Lines of jsonl can be found from any byte on, and row groups of parquet. Of a compressed file, an array, rows with
    quoted line breaks or an archive no part can be read without all before it.
    """
    if isinstance(path, HubDataset):
        return [(number, number + 1) for number in range(open_stream(path).num_shards)]
    if num_bytes <= unit_bytes or (suffix := suffix_of(path.name)) not in (".jsonl", ".parquet"):
        return []
    if suffix == ".jsonl":
        starts = range(0, num_bytes, unit_bytes)
        return [(start, min(start + unit_bytes, num_bytes)) for start in starts]
    return _row_groups(path, unit_bytes)


def _row_groups(path: Path, unit_bytes: int) -> list[tuple[int, int]]:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    try:
        with io.BufferedReader(PatientFile(path), _READ_BYTES) as file:
            metadata = parquet.ParquetFile(file).metadata
    except (pa.ArrowException, OSError, ValueError) as error:  # reading it says what is wrong with it
        if isinstance(error, OSError) and error.errno is not None:
            raise
        return []
    parts, start, num_bytes = [], 0, 0
    for number in range(metadata.num_row_groups):
        num_bytes += metadata.row_group(number).total_byte_size
        if num_bytes >= unit_bytes or number == metadata.num_row_groups - 1:
            parts.append((start, number + 1))
            start, num_bytes = number + 1, 0
    return parts


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
            yield from _until_damage(map(_row, rows(path, stream, shard)), f"{path}/{shard}")
    elif stat.S_ISDIR(patiently(path, path.stat).st_mode):
        yield from _dataset(path, split)
    elif part.end is not None:
        read = _lines_from if path.suffix.lower() == ".jsonl" else _parquet
        with io.BufferedReader(PatientFile(path), _READ_BYTES) as file:
            yield from _until_damage(read(file, str(path), limits, part.start, part.end), str(path))
    elif path.suffix.lower() == ".idx":
        yield from _until_damage(_megatron(path), str(path))
    else:
        with io.BufferedReader(PatientFile(path), _READ_BYTES) as file:
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


def _text(stream: BinaryIO, where: str, limits: Limits) -> Records:
    """The whole file, which is not held in memory if it is long and there is a place for it."""
    pieces, num_bytes = [], 0
    spool: TextSpool | None = None
    while (block := stream.read(_READ_BYTES)) and num_bytes <= limits.max_record_bytes:
        num_bytes += len(block)
        pieces.append(block)
        if spool is None and limits.spool is not None and num_bytes > LONG_BYTES:
            spool, pieces[0] = TextSpool(limits.spool), pieces[0].removeprefix(_BYTE_ORDER_MARK)
        while spool is not None and pieces:
            spool.write_bytes(pieces.pop(0))
    if num_bytes > limits.max_record_bytes:
        yield RawRecord(where, b"".join(pieces), is_text=True, bad=limits.too_large(num_bytes))
    elif spool is None:
        yield RawRecord(where, b"".join(pieces), is_text=True)
    else:
        spool.write_bytes(b"", last=True)
        yield RawRecord(where, spool.finish(), is_text=True)


def _jsonl(stream: BinaryIO, where: str, limits: Limits) -> Records:
    return _lines(stream, where, limits)


def _lines(stream: BinaryIO, where: str, limits: Limits, at: int = 0, end: int | None = None) -> Records:
    """One object per line that starts before `end`. Lines end at \\n only: U+2028 may occur inside a string."""
    is_start, number = at == 0, 0
    while (end is None or at < end) and (line := stream.readline(LONG_BYTES)):
        number, at = number + 1, at + len(line)
        place = f"{where}:{number}"
        raw = line.removeprefix(_BYTE_ORDER_MARK) if number == 1 and is_start else line
        if len(line) == LONG_BYTES and not line.endswith(b"\n"):
            record, num_bytes = _long_line(raw, stream, place, limits)
            at += num_bytes
            yield record
        elif len(line) > limits.max_record_bytes:
            yield RawRecord(place, line, bad=limits.too_large(len(line)))
        else:
            yield RawRecord(place, raw) if raw and not raw.isspace() else None


def _long_line(line: bytes, stream: BinaryIO, where: str, limits: Limits) -> tuple[RawRecord, int]:
    """The record of a line that begins with `line`, and the number of bytes that follow."""
    kept, reader = [line], None if limits.spool is None else LongLine(limits.spool)
    num_bytes, bad, piece = len(line), None, line
    while piece:
        if num_bytes > limits.max_record_bytes:
            kept.clear()
        elif reader is not None and bad is None:
            try:
                reader.feed(kept.pop())
            except ValueError as error:
                bad = _not_json(error, in_piece=True)
        piece = b"" if piece.endswith(b"\n") else stream.readline(_READ_BYTES)
        num_bytes += len(piece)
        if piece and num_bytes <= limits.max_record_bytes and bad is None:
            kept.append(piece)
    more = num_bytes - len(line)
    if num_bytes > limits.max_record_bytes:
        return RawRecord(where, b"", bad=limits.too_large(num_bytes)), more
    if reader is None:
        return RawRecord(where, b"".join(kept)), more
    try:
        return RawRecord(where, b"" if bad else _object(reader.finish()), bad=bad), more
    except BadRecord as error:
        bad = error
    except (ValueError, RecursionError) as error:
        bad = _not_json(error, in_piece=True)
    return RawRecord(where, b"", bad=bad), more


def _lines_from(stream: BinaryIO, where: str, limits: Limits, start: int, end: int) -> Records:
    """The lines that start in bytes [start, end)."""
    at = max(start - 1, 0)
    stream.seek(at)
    while start and at < end:  # the rest of a line that starts earlier, which may be longer than this part
        piece = stream.readline(_READ_BYTES)
        at += len(piece)
        if not piece or piece.endswith(b"\n"):
            break
    yield from _lines(stream, where, limits, at, end)


def _json(stream: BinaryIO, where: str, limits: Limits) -> Records:
    """One array of objects, or one object per line."""
    head = stream.read(_READ_BYTES)
    start = head.removeprefix(_BYTE_ORDER_MARK).lstrip()
    if not start.startswith(b"["):
        yield from _lines(io.BufferedReader(_Behind(head, stream)), where, limits)
        return
    reader = io.TextIOWrapper(io.BufferedReader(_Behind(start[1:], stream)), encoding="utf-8")
    decoder, text, number = json.JSONDecoder(), "", 0
    while True:
        text = text.lstrip(" \t\r\n" + ("," if number else ""))
        if text.startswith("]"):
            return
        try:
            value, end = decoder.raw_decode(text)
        except ValueError as error:
            if len(text) > limits.max_record_bytes:
                raise limits.too_large(len(text)) from None
            more = reader.read(max(_READ_BYTES, len(text)))
            if not more:
                raise BadRecord("bad_json", f"not valid JSON after element {number} of the array ({error})") from None
            text += more
            continue
        number += 1
        text = text[end:]
        # Anything but an object becomes the bad record that it would be on a line of its own.
        content = value if isinstance(value, dict) else json.dumps(value).encode()
        yield RawRecord(f"{where}:{number}", content)


class _Behind(io.RawIOBase):
    """A stream with bytes that were already read put back before the rest."""

    def __init__(self, head: bytes, rest: BinaryIO) -> None:
        self._head, self._rest = memoryview(head), rest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._head[: len(buffer)] if self._head else self._rest.read(len(buffer))
        self._head = self._head[len(data) :]
        buffer[: len(data)] = data
        return len(data)


def _csv(stream: BinaryIO, where: str, limits: Limits) -> Records:
    """One object per row, named by the first row; a file that ends in .tsv has tabs."""
    csv.field_size_limit(2**31 - 1)  # the default refuses documents above 128 KiB
    lines = (line.decode("utf-8", "surrogateescape") for line in stream)  # a bad byte spoils its record only
    reader = csv.reader(lines, delimiter="\t" if ".tsv" in PurePosixPath(where).suffixes else ",", strict=True)
    header = [name.removeprefix("\ufeff") for name in next(reader, [])]
    if len(set(header)) != len(header):
        raise BadRecord("damaged_file", f"two columns have one name: {header[:8]}")
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:  # the next row is read afresh
            yield RawRecord(f"{where}:{reader.line_num}", b"", bad=BadRecord("bad_csv", str(error)))
            continue
        if not row:
            yield None
        elif len(row) == len(header):
            yield RawRecord(f"{where}:{reader.line_num}", dict(zip(header, row, strict=True)))
        else:
            bad = BadRecord("wrong_columns", f"{len(row)} values for {len(header)} columns")
            yield RawRecord(f"{where}:{reader.line_num}", json.dumps(row).encode(), bad=bad)


def _parquet(stream: BinaryIO, where: str, limits: Limits, start: int = 0, end: int | None = None) -> Records:
    """The rows of row groups [start, end), counted from the file's first."""
    import pyarrow.parquet as parquet

    file = parquet.ParquetFile(_seekable(stream))
    groups = list(range(file.metadata.num_row_groups))
    before = sum(file.metadata.row_group(number).num_rows for number in groups[:start])
    yield from _rows(file.iter_batches(_ROWS, row_groups=groups[start:end]), where, before)


def _arrow(stream: BinaryIO, where: str, limits: Limits) -> Records:
    """Arrow's IPC format: a file, or a stream such as `datasets` writes."""
    import pyarrow as pa

    seekable = _seekable(stream)
    is_file = seekable.read(6) == b"ARROW1"
    seekable.seek(0)
    if is_file:
        opened = pa.ipc.open_file(seekable)
        batches = (opened.get_batch(index) for index in range(opened.num_record_batches))
    else:
        batches = iter(pa.ipc.open_stream(seekable))
    pieces = (
        batch.slice(start, _ROWS) for batch in map(_checked, batches) for start in range(0, batch.num_rows, _ROWS)
    )
    yield from _rows(pieces, where)


def _checked(batch: Any) -> Any:
    """The batch itself; a ValueError if its offsets lead outside it, where reading a value could end the process."""
    import pyarrow as pa

    binary = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary()}
    for column in batch.columns:  # invalid UTF-8 is the fault of one record
        (column.view(binary[column.type]) if column.type in binary else column).validate(full=True)
    return batch


def _rows(batches: Iterator[Any], where: str, number: int = 0) -> Records:
    for batch in batches:
        for row in _values(batch):
            number += 1
            if isinstance(row, dict):
                yield RawRecord(f"{where}:{number}", row)
            else:
                bad = BadRecord("invalid_utf8", f"invalid UTF-8 in a string of the row ({row.reason})")
                yield RawRecord(f"{where}:{number}", b"", bad=bad)


def _values(batch: Any) -> list[Fields | UnicodeDecodeError]:
    """The rows of a batch; an error in place of one that has invalid UTF-8."""
    try:
        return batch.to_pylist()
    except UnicodeDecodeError as error:
        if batch.num_rows == 1:
            return [error]
        return [value for row in range(batch.num_rows) for value in _values(batch.slice(row, 1))]


def _row(placed: tuple[str, Fields]) -> RawRecord:
    return RawRecord(*placed)


def _seekable(stream: BinaryIO) -> BinaryIO:
    """The stream, or its content in memory: inside a compressed file or an archive, one cannot go back cheaply."""
    return stream if isinstance(stream, io.BufferedReader) and stream.seekable() else io.BytesIO(stream.read())


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


def _dataset(folder: Path, split: str | None) -> Records:
    import datasets

    dataset = datasets.load_from_disk(str(folder))
    if isinstance(dataset, datasets.DatasetDict):
        if split not in dataset:
            raise DataError(
                f"{folder}: split {split!r} is none of {', '.join(map(str, dataset))}", remedy="set the source's split"
            )
        dataset = dataset[split]
    for number, row in enumerate(dataset, start=1):
        yield RawRecord(f"{folder}:{number}", dict(row))


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
    ".jsonl": _jsonl,
    ".json": _json,
    ".txt": _text,
    ".md": _text,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
    ".arrow": _arrow,
}
_FORMATS = (*_READ, ".tar", ".idx")
FORMATS = f"{', '.join(_FORMATS)}, each also with {', '.join(_OPEN)}"
