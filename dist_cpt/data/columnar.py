"""Records of columnar files: rows of Parquet and Arrow, and of folders that `datasets` saved."""

from __future__ import annotations

import io
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

from dist_cpt.data.records import BadRecord, Fields, Limits, RawRecord, Records
from dist_cpt.errors import DataError
from dist_cpt.storage import PatientFile, is_there

_READ_BYTES = 1 << 20
_ROWS = 1024  # of a file that are Python objects at a time


def is_dataset_folder(folder: Path) -> bool:
    """Whether `datasets` saved a data set, or one per split, in this folder."""
    is_one = is_there(folder / "dataset_info.json") and any(folder.glob("*.arrow"))
    return is_one or is_there(folder / "dataset_dict.json")


def row_groups(path: Path, unit_bytes: int) -> list[tuple[int, int]]:
    """Ranges [start, end) of row groups of about `unit_bytes`; none of a file that is not Parquet."""
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


def record_batches(path: Path, unit_bytes: int) -> list[tuple[int, int]]:
    """Ranges [start, end) of an IPC file's record batches, of about `unit_bytes` if these are alike; none of a stream,
    which has no index."""
    import pyarrow as pa

    try:
        with io.BufferedReader(PatientFile(path), _READ_BYTES) as file:
            num_bytes = file.seek(0, io.SEEK_END)
            num_batches = pa.ipc.open_file(file).num_record_batches
    except (pa.ArrowException, OSError, ValueError) as error:  # a stream; reading it says what is wrong with another
        if isinstance(error, OSError) and error.errno is not None:
            raise
        return []
    num_parts = min(num_batches, -(-num_bytes // unit_bytes))
    borders = [num_batches * number // num_parts for number in range(num_parts + 1)] if num_parts else []
    return list(pairwise(borders))


def rows_before(path: Path, batch: int) -> int:
    """The rows in the record batches of an IPC file before number `batch`, which are read."""
    import pyarrow as pa

    with io.BufferedReader(PatientFile(path), _READ_BYTES) as file:
        opened = pa.ipc.open_file(file)
        return sum(opened.get_batch(number).num_rows for number in range(batch))


def read_parquet(stream: BinaryIO, where: str, limits: Limits, start: int = 0, end: int | None = None) -> Records:
    """The rows of row groups [start, end), counted from the file's first."""
    import pyarrow.parquet as parquet

    file = parquet.ParquetFile(_seekable(stream))
    groups = list(range(file.metadata.num_row_groups))
    before = sum(file.metadata.row_group(number).num_rows for number in groups[:start])
    yield from _rows(file.iter_batches(_ROWS, row_groups=groups[start:end]), where, before)


def read_arrow(stream: BinaryIO, where: str, limits: Limits, start: int = 0, end: int | None = None) -> Records:
    """Arrow's IPC format: a file, of which record batches [start, end) are read and their rows counted from the first
    of these, or a stream such as `datasets` writes."""
    import pyarrow as pa

    seekable = _seekable(stream)
    is_file = seekable.read(6) == b"ARROW1"
    seekable.seek(0)
    if is_file:
        opened = pa.ipc.open_file(seekable)
        batches = (opened.get_batch(index) for index in range(opened.num_record_batches)[start:end])
    else:
        batches = iter(pa.ipc.open_stream(seekable))
    pieces = (
        batch.slice(first, _ROWS) for batch in map(_checked, batches) for first in range(0, batch.num_rows, _ROWS)
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


def _seekable(stream: BinaryIO) -> BinaryIO:
    """The stream, or its content in memory: inside a compressed file or an archive, one cannot go back cheaply."""
    return stream if isinstance(stream, io.BufferedReader) and stream.seekable() else io.BytesIO(stream.read())


def read_saved_dataset(folder: Path, split: str | None) -> Records:
    """The rows of a split, or of a data set that has none."""
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
