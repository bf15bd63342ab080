"""safetensors files, one tensor in memory at a time: write, scan, and read slices.

The format is an 8-byte little-endian header length, a JSON header and the raw tensors without gaps.
Source: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import threading
from collections import deque
from collections.abc import Callable, Collection, Generator, Mapping
from concurrent.futures import Future, wait
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dist_cpt.checkpoint.byte_check import CHUNK_BYTES, open_file
from dist_cpt.errors import CheckpointError, NumericsError
from dist_cpt.runtime.liveness import made_progress
from dist_cpt.runtime.threads import started
from dist_cpt.storage import PatientFile

_ITEM_BYTES = 4  # every tensor of a checkpoint is fp32
_STREAMS = 4  # of one file, each a thread: one stream has a fraction of a parallel file system's bandwidth
_PIECE_BYTES = 2**18  # of a tensor or a small file that several of them transfer: a thread costs less
_PARTS = 8  # of a file that is written: each is forced to the disk and read back while the next ones are written
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library


@dataclass(frozen=True)
class Entry:
    """The place of one fp32 tensor: absolute byte offsets in the file."""

    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class TensorScan:
    """The content of one tensor in a file; `sha256` is of its fp32 bytes in C order."""

    shape: tuple[int, ...]
    sha256: str
    finite: bool


@dataclass(frozen=True)
class FileScan:
    num_bytes: int
    sha256: str
    tensors: dict[str, TensorScan]


class StreamWriter:
    """Writes the header for known shapes first, then the tensors in any order, several at the same time.

    `read_back`, on a thread of its own, follows the writes.
    """

    def __init__(self, path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
        header, self._entries = _layout(shapes)
        self._path = path
        self._missing = set(shapes)
        self._in_order = list(self._entries.values())
        self._num_bytes = self._in_order[-1].stop
        self._written: set[Entry] = set()
        self._num_leading = 0  # entries up to the first one that is not written
        self._on_disk = 0  # the bytes up to here are, and not in the page cache
        self._change = threading.Condition()
        self._forcing = threading.Lock()
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        try:
            os.ftruncate(self._fd, self._num_bytes)  # the size that the header describes, for who reads behind
            _write_all(self._fd, memoryview(header), 0)
        except BaseException:
            self.close()
            raise

    def write(self, key: str, values: torch.Tensor) -> str:
        """Write one tensor (fp32, CPU) and return the sha256 of its bytes. Thread-safe.

        Raises:
            NumericsError: a value is not finite.
            CheckpointError: the tensor does not have the shape and dtype of the header.
        """
        entry = self._entries[key]
        if tuple(values.shape) != entry.shape or values.dtype != torch.float32 or values.device.type != "cpu":
            raise CheckpointError(
                f"{key}: expected fp32 {list(entry.shape)} on the CPU, got {values.dtype} "
                f"{list(values.shape)} on {values.device}"
            )
        if not is_finite(values):
            raise NumericsError(f"{key} has values that are not finite: it is not saved")
        with self._change:
            if key not in self._missing:
                raise CheckpointError(f"{key} was exported twice")
            self._missing.remove(key)
        data = _bytes_of(values.detach().contiguous().view(-1))
        written = _in_pieces(partial(_write_all, self._fd), data, entry.start)
        sha256 = hashlib.sha256(data).hexdigest()
        _finish(written)
        with self._change:
            self._written.add(entry)
            while self._num_leading < len(self._in_order) and self._in_order[self._num_leading] in self._written:
                self._num_leading += 1
            self._change.notify_all()
        return sha256

    def read_back(self) -> FileScan:
        """Read every part of the file once it is on the disk; ends after `finish`.

        Raises:
            CheckpointError: as `scan`; or the file was closed before it was finished.
            StorageError, OSError: the file system does not answer, or does not write.
        """
        self._wait_for_disk(self._in_order[0].stop)  # the header too
        return scan(self._path, self._wait_for_disk)

    def finish(self) -> None:
        """Force everything to the disk and close.

        Raises:
            CheckpointError: a tensor of the header was never written.
        """
        if self._missing:
            raise CheckpointError(f"{self._path.name}: {min(self._missing)} was not exported")
        with self._forcing:
            os.fsync(self._fd)
            self._leave_cache(self._num_bytes)
        self.close()

    def close(self) -> None:
        """Close the file as it is; safe to call twice."""
        with self._forcing, self._change:
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1
            self._change.notify_all()

    def _wait_for_disk(self, stop: int) -> None:
        """Return once the bytes before `stop` are on the disk; force a part there as soon as it is written."""
        while True:
            with self._change:
                self._change.wait_for(lambda: self._on_disk >= stop or self._fd < 0 or self._part_is_written())
                if self._on_disk >= stop:
                    return
            with self._forcing:
                if self._fd < 0:
                    if self._on_disk < stop:
                        raise CheckpointError(f"{self._path.name} was closed before it was written")
                elif self._part_is_written():
                    edge = self._edge()
                    os.fsync(self._fd)
                    self._leave_cache(edge - edge % os.sysconf("SC_PAGE_SIZE"))  # the rest of a page is written later

    def _part_is_written(self) -> bool:
        """Whether there is enough to be forced; the end of the file is left to `finish`."""
        return self._on_disk + max(CHUNK_BYTES, self._num_bytes // _PARTS) <= self._edge() < self._num_bytes

    def _edge(self) -> int:
        """All bytes before it are written."""
        return self._in_order[self._num_leading - 1].stop if self._num_leading else self._in_order[0].start

    def _leave_cache(self, edge: int) -> None:
        """So that reading back reads the disk, not the page cache."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._fd, self._on_disk, edge - self._on_disk, os.POSIX_FADV_DONTNEED)
        with self._change:
            self._on_disk = edge
            self._change.notify_all()


class TensorFile:
    """Reads slices of the tensors of one file."""

    def __init__(self, path: Path) -> None:
        # Plain reads, not a memory map: a file truncated meanwhile is an error, not a SIGBUS.
        self._path = path
        self._file = open_file(path)
        try:
            self.entries = _read_header(self._file, path)
        except BaseException:
            self.close()
            raise

    def read(self, key: str, start: int, stop: int) -> torch.Tensor:
        """Flat fp32 [stop - start]: these elements of the tensor in C order.

        Raises:
            CheckpointError: no such tensor or slice, or the file ends early.
            StorageError: the file system does not answer.
        """
        entry = self.entries.get(key)
        if entry is None:
            raise CheckpointError(f"{self._path} has no tensor {key}")
        if not 0 <= start <= stop <= math.prod(entry.shape):
            raise CheckpointError(
                f"{self._path}: {key} has {math.prod(entry.shape)} elements, asked for {start}:{stop}"
            )
        values = torch.empty(stop - start, dtype=torch.float32)
        if stop == start:
            return values
        begin = entry.start + start * _ITEM_BYTES
        _finish(_in_pieces(partial(_read_all, self._file, self._path), _bytes_of(values), begin))
        return values

    def close(self) -> None:
        """Close the file; safe to call twice."""
        self._file.close()


def scan(path: Path, wait_until_readable: Callable[[int], object] = lambda stop: None) -> FileScan:
    """Read a file once, in order: hash it and every tensor in it, and check that values are finite.

    `wait_until_readable(stop)` is called, on any thread, before bytes up to `stop` are read.

    Raises:
        CheckpointError: not a regular file, or not a valid safetensors file of fp32 tensors.
        StorageError: the file system does not answer.
    """
    with open_file(path) as file:
        entries = sorted(_read_header(file, path).items(), key=lambda item: item[1].start)
        data_start, data_stop = entries[0][1].start, entries[-1][1].stop
        whole = hashlib.sha256(_read_at(file, path, data_start, 0))
        tensors = {}
        unread = iter(entries)
        key, entry = next(unread)
        digest, finite = hashlib.sha256(), True
        with closing(_chunks_ahead(file, path, (data_start, data_stop), wait_until_readable)) as chunks:
            for start, chunk in chunks:
                hashed = started(partial(whole.update, _bytes_of(chunk)))  # beside the hash of the tensor
                stop = start + chunk.nbytes
                while entry.start < stop:
                    first, last = max(entry.start, start) - start, min(entry.stop, stop) - start
                    part = chunk[first // _ITEM_BYTES : last // _ITEM_BYTES]
                    digest.update(_bytes_of(part))
                    finite = finite and is_finite(part)
                    if entry.stop > stop:
                        break
                    tensors[key] = TensorScan(entry.shape, digest.hexdigest(), finite)
                    key, entry = next(unread, ("", Entry((), data_stop, data_stop)))
                    digest, finite = hashlib.sha256(), True
                hashed.result()
        return FileScan(data_stop, whole.hexdigest(), tensors)


def tensor_sha256(values: torch.Tensor) -> str:
    """sha256 of the bytes of an fp32 CPU tensor in C order."""
    return hashlib.sha256(_bytes_of(values.detach().contiguous().view(-1))).hexdigest()


def is_finite(values: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite; allocates no temporary of the tensor's size."""
    low, high = torch.aminmax(values)
    return math.isfinite(low.item()) and math.isfinite(high.item())


def _layout(shapes: Mapping[str, tuple[int, ...]]) -> tuple[bytes, dict[str, Entry]]:
    """Header bytes, and every tensor's place, in the given order."""
    fields: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for key, shape in shapes.items():
        stop = offset + math.prod(shape) * _ITEM_BYTES
        if stop == offset:
            raise CheckpointError(f"{key} is empty, shape {list(shape)}")
        fields[key] = {"dtype": "F32", "shape": list(shape), "data_offsets": [offset, stop]}
        offset = stop
    body = json.dumps(fields, separators=(",", ":")).encode()
    body += b" " * (-len(body) % 8)  # keeps the tensors aligned to 8 bytes
    begin = 8 + len(body)
    entries = {
        key: Entry(shape, *(begin + edge for edge in fields[key]["data_offsets"])) for key, shape in shapes.items()
    }
    return len(body).to_bytes(8, "little") + body, entries


def _read_header(file: PatientFile, path: Path) -> dict[str, Entry]:
    size = file.num_bytes()
    length = int.from_bytes(_read_at(file, path, 8, 0), "little") if size >= 8 else 0
    if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
        raise CheckpointError(f"{path} is truncated or not a safetensors file ({size} bytes)")
    try:
        fields = json.loads(_read_at(file, path, length, 8))
        fields.pop("__metadata__", None)
        entries = {key: _entry(field, 8 + length) for key, field in fields.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: the header is damaged ({error})") from None
    edge = 8 + length
    for key, entry in sorted(entries.items(), key=lambda item: item[1].start):
        if entry.start != edge or entry.stop - entry.start != math.prod(entry.shape) * _ITEM_BYTES:
            raise CheckpointError(f"{path}: {key} is not at the offsets of its shape")
        if entry.stop == entry.start:
            raise CheckpointError(f"{path}: {key} is empty, shape {list(entry.shape)}")
        edge = entry.stop
    if not entries or edge != size:
        raise CheckpointError(f"{path} has {size} bytes, its header describes {edge}")
    return entries


def _entry(field: Any, begin: int) -> Entry:
    if field["dtype"] != "F32":
        raise ValueError(f"dtype {field['dtype']}, expected F32")
    shape = tuple(field["shape"])
    start, stop = field["data_offsets"]
    if not all(type(n) is int and n >= 0 for n in (*shape, start, stop)):
        raise ValueError("sizes must be non-negative integers")
    return Entry(shape, begin + start, begin + stop)


def _chunks_ahead(
    file: PatientFile, path: Path, between: tuple[int, int], wait_until_readable: Callable[[int], object]
) -> Generator[tuple[int, torch.Tensor]]:
    """(offset, fp32 values) of one chunk after the other, each valid until the next; those are being read meanwhile."""
    start, stop = between
    size = min(CHUNK_BYTES, max(_PIECE_BYTES, (stop - start) // (8 * _STREAMS) // _ITEM_BYTES * _ITEM_BYTES))
    buffers = [torch.empty(size // _ITEM_BYTES, dtype=torch.float32) for _ in range(_STREAMS + 1)]

    def read(offset: int) -> tuple[int, torch.Tensor]:
        number = (offset - start) // size
        chunk = buffers[number % len(buffers)][: min(size, stop - offset) // _ITEM_BYTES]
        wait_until_readable(offset + chunk.nbytes)
        _read_all(file, path, _bytes_of(chunk), offset)
        return offset, chunk

    under_way: deque[Future[tuple[int, torch.Tensor]]] = deque()
    try:
        for offset in range(start, stop, size):
            if len(under_way) == _STREAMS:
                yield under_way.popleft().result()
            under_way.append(started(partial(read, offset)))
        while under_way:
            yield under_way.popleft().result()
    finally:
        wait(under_way)  # the file is closed next


def _in_pieces(transfer: Callable[[memoryview, int], None], data: memoryview, offset: int) -> list[Future[None]]:
    """Transfer `data` at `offset` of a file: now if it is small, else start several pieces."""
    if len(data) <= _PIECE_BYTES:
        transfer(data, offset)
        return []
    size = max(_PIECE_BYTES, -(-len(data) // _STREAMS))
    return [
        started(partial(transfer, data[start : start + size], offset + start)) for start in range(0, len(data), size)
    ]


def _finish(pieces: Collection[Future[None]]) -> None:
    """Wait for all, then raise the first error: no thread may still use a file that is closed next."""
    for piece in wait(pieces).done:
        piece.result()


def _bytes_of(flat: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, shared, not copied."""
    return flat.numpy().data.cast("B")


def _write_all(fd: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(fd, data[:CHUNK_BYTES], offset)
        data, offset = data[written:], offset + written
        made_progress()


def _read_at(file: PatientFile, path: Path, num_bytes: int, offset: int) -> bytes:
    data = bytearray(num_bytes)
    _read_all(file, path, memoryview(data), offset)
    return bytes(data)


def _read_all(file: PatientFile, path: Path, data: memoryview, offset: int) -> None:
    while data:
        count = file.pread_into(data[:CHUNK_BYTES], offset)
        if count == 0:
            raise CheckpointError(f"{path} ends early, at byte {offset}")
        data, offset = data[count:], offset + count
        made_progress()
