"""Token ids on disk: Megatron-LM's .bin/.idx pair, and a manifest with sizes, counts and hashes.

Source: Megatron-LM, megatron/core/datasets/indexed_dataset.py (MMIDIDX, version 1).
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dist_cpt.errors import DataError
from dist_cpt.run_folder.json_files import fsync_path
from dist_cpt.run_folder.names import MANIFEST
from dist_cpt.runtime.liveness import made_progress
from dist_cpt.storage import PatientFile, is_there, patiently, read_bytes

MAGIC = b"MMIDIDX\x00\x00"
INDEX_VERSION = 1
FORMAT_VERSION = 2
_READ_VERSIONS = (1, FORMAT_VERSION)  # 1 has one hash per file, and none of the input
CHUNK_BYTES = 64 * 2**20  # of a file that are hashed together, so that ranks can divide a check
HEADER = np.dtype([("magic", "S9"), ("version", "<u8"), ("dtype", "u1"), ("sequences", "<u8"), ("documents", "<u8")])
# Megatron-LM's codes of the two integer types it picks by vocabulary size.
DTYPE_CODES = {np.dtype(np.uint16): 8, np.dtype(np.int32): 4}
UINT16_VOCABULARY = 65500
BIN, IDX, QUARANTINE = "tokens.bin", "tokens.idx", "quarantine.jsonl"
TOKENIZER = "tokenizer.json"  # what turns the tokens back into text
LabelKind = Literal["answers", "classes"]
# Labels beside the tokens: per token whether it is part of an answer (0 or 1), or per document its class.
LABEL_FILES: dict[LabelKind, tuple[str, np.dtype]] = {
    "answers": ("answers.bin", np.dtype(np.uint8)),
    "classes": ("classes.bin", np.dtype("<i4")),
}
_CHUNK = 1 << 20  # index entries
_READ_BYTES = 4 * 2**20


def token_dtype(vocab_size: int) -> np.dtype:
    """uint16 below 65500 ids, else int32."""
    return np.dtype(np.uint16) if vocab_size < UINT16_VOCABULARY else np.dtype(np.int32)


@dataclass(frozen=True)
class StoreManifest:
    """The content of manifest.json."""

    format_version: int
    vocab_size: int
    tokenizer_hash: str
    dtype: str  # uint16 | int32
    num_documents: int
    num_tokens: int
    max_token_id: int
    files: dict[str, dict[str, Any]]  # name -> {bytes, sha256, chunk_bytes, chunks: their sha256}
    source: dict[str, Any]  # name, path, field, policy
    counts: dict[str, Any]  # records, blank lines, empty, bad by reason ...
    inputs: list[dict[str, Any]]  # [{path, bytes, mtime_ns, sha256}]
    settings: str = ""  # sha256 of what makes tokens of the input

    @property
    def content_hash(self) -> str:
        """sha256 over the tokens, their borders and their labels; independent of the input files."""
        hashes = [self.dtype, self.files[BIN]["sha256"], self.files[IDX]["sha256"]]
        if self.label_kind is not None:
            hashes += [self.label_kind, self.files[LABEL_FILES[self.label_kind][0]]["sha256"]]
        return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()

    @property
    def label_kind(self) -> LabelKind | None:
        """The kind of labels in the store, if any."""
        return next((kind for kind, (name, _) in LABEL_FILES.items() if name in self.files), None)


@dataclass(frozen=True)
class Chunk:
    """A part of a store's file, which must have this sha256."""

    path: Path
    number: int
    start: int
    num_bytes: int
    sha256: str

    def check(self) -> None:
        """Read and compare it.

        Raises:
            DataError: it differs.
        """
        found = sha256_of(self.path, self.start, self.num_bytes)
        if found != self.sha256:
            raise damaged(
                self.path,
                f"chunk {self.number} ({self.num_bytes} bytes from {self.start}) has sha256 {found[:12]}..., expected "
                f"{self.sha256[:12]}... from the manifest",
            )


def sha256_of(path: Path, start: int, num_bytes: int) -> str:
    """sha256 of a part of a file, or of what there is of it."""
    sha256 = hashlib.sha256()
    with PatientFile(path, expected=True) as file:
        file.seek(start)
        while num_bytes > 0 and (block := file.read(min(num_bytes, _READ_BYTES))):
            sha256.update(block)
            num_bytes -= len(block)
            made_progress()
    return sha256.hexdigest()


def chunks_of(folder: Path, files: Mapping[str, dict[str, Any]]) -> list[Chunk]:
    """Every byte of a manifest's files in parts, with their hashes; where there is one hash per file, whole files.

    Raises:
        DataError: the manifest does not have a hash for every part.
    """
    chunks = []
    for name, entry in files.items():
        size = entry["bytes"]
        part, hashes = entry.get("chunk_bytes", size), entry.get("chunks", [entry["sha256"]] if size else [])
        starts = range(0, size, part) if size else range(0)
        if len(starts) != len(hashes):
            raise damaged(folder / MANIFEST, f"{len(hashes)} hashes of {name}, which has {len(starts)} chunks")
        chunks += [
            Chunk(folder / name, number, start, min(part, size - start), sha256)
            for number, (start, sha256) in enumerate(zip(starts, hashes, strict=True))
        ]
    return chunks


def place_of(folder: Path, names: Iterable[str]) -> list[list[int]]:
    """File system, inode, size and time of files: equal for processes that see the same ones."""
    stats = [(os.statvfs(path).f_fsid, path.stat()) for path in (folder / name for name in names)]
    return [[system, stat.st_ino, stat.st_size, stat.st_mtime_ns] for system, stat in stats]


def check_chunks(chunks: Sequence[Chunk]) -> None:
    """Read and compare chunks, several at a time.

    Raises:
        DataError: names the first that differs.
    """
    with ThreadPoolExecutor(max_workers=4) as pool:  # hashing releases the interpreter lock
        list(pool.map(Chunk.check, chunks))


class StoreWriter:
    """Writes one store into an existing, empty folder; it is complete only after `finish`."""

    def __init__(self, folder: Path, vocab_size: int, label_kind: LabelKind | None = None) -> None:
        self.num_documents = 0
        self._folder = folder
        self._vocab_size = vocab_size
        self._dtype = token_dtype(vocab_size)
        self._num_tokens = 0
        self._max_token_id = -1
        self._label_kind: LabelKind | None = label_kind
        self._labels: _HashedFile | None = None
        with ExitStack() as opened:
            self._bin = opened.enter_context(closing(_HashedFile(folder / BIN)))
            # int32 per document, until their number is known.
            self._lengths = opened.enter_context(tempfile.TemporaryFile(dir=folder))
            if label_kind is not None:
                self._labels = opened.enter_context(closing(_HashedFile(folder / LABEL_FILES[label_kind][0])))
            self._opened = opened.pop_all()

    def append(self, ids: np.ndarray, lengths: np.ndarray, labels: np.ndarray | None = None) -> None:
        """Add documents: ids int [T] in a row, lengths int32 [num_documents] that sum to T, and in a store with
        labels these: answers [T] or classes [num_documents].

        Raises:
            DataError: an id outside the vocabulary.
        """
        if not len(ids):
            return
        largest = largest_id(ids, self._vocab_size)
        self._bin.write(np.ascontiguousarray(ids, dtype=self._dtype).data)
        self._lengths.write(np.asarray(lengths, dtype="<i4").tobytes())
        self.num_documents += len(lengths)
        self._num_tokens += len(ids)
        self._max_token_id = max(self._max_token_id, largest)
        if self._label_kind is not None and self._labels is not None:
            expected = len(ids) if self._label_kind == "answers" else len(lengths)
            if labels is None or len(labels) != expected:
                raise ValueError(f"a store of {self._label_kind} takes {expected} labels here")
            self._labels.write(np.ascontiguousarray(labels, dtype=LABEL_FILES[self._label_kind][1]).data)

    def finish(
        self,
        tokenizer_hash: str,
        source: dict[str, Any],
        counts: dict[str, Any],
        inputs: list[dict[str, Any]],
        settings: str = "",
        tokenizer: str | None = None,
    ) -> None:
        """Write the index and the serialised tokenizer, then the manifest as the last file, all flushed to disk."""
        files = {BIN: self._bin.finish(), IDX: self._write_index()}
        self._lengths.close()
        if tokenizer is not None:
            files[TOKENIZER] = write_hashed(self._folder / TOKENIZER, tokenizer.encode("utf-8"))
        if self._label_kind is not None and self._labels is not None:
            files[LABEL_FILES[self._label_kind][0]] = self._labels.finish()
        manifest = StoreManifest(
            FORMAT_VERSION,
            self._vocab_size,
            tokenizer_hash,
            self._dtype.name,
            self.num_documents,
            self._num_tokens,
            self._max_token_id,
            files,
            source,
            counts,
            inputs,
            settings,
        )
        write_hashed(self._folder / MANIFEST, json.dumps(asdict(manifest), indent=1).encode("utf-8"))
        fsync_path(self._folder)

    def close(self) -> None:
        """Close the files, finished or not."""
        self._opened.close()

    def _read_lengths(self) -> Iterator[np.ndarray]:
        self._lengths.seek(0)
        while part := self._lengths.read(4 * _CHUNK):
            yield np.frombuffer(part, "<i4")

    def _write_index(self) -> dict[str, Any]:
        num_documents = self.num_documents
        header = np.zeros((), HEADER)
        header["magic"], header["version"], header["dtype"] = MAGIC, INDEX_VERSION, DTYPE_CODES[self._dtype]
        # One sequence per document; the document index has one entry more than there are documents.
        header["sequences"], header["documents"] = num_documents, num_documents + 1
        with closing(_HashedFile(self._folder / IDX)) as file:
            # numpy drops trailing NULs of an S9 when read, but stores all nine bytes.
            file.write(header.tobytes())
            for lengths in self._read_lengths():
                file.write(lengths.tobytes())
            pointer = 0
            for lengths in self._read_lengths():
                sizes = lengths.astype("<i8") * self._dtype.itemsize
                ends = pointer + np.cumsum(sizes)
                file.write((ends - sizes).tobytes())
                pointer = int(ends[-1])
            for start in range(0, num_documents + 1, _CHUNK):
                file.write(np.arange(start, min(start + _CHUNK, num_documents + 1), dtype="<i8").tobytes())
            return file.finish()


class _Hashes:
    """sha256 of bytes that come in pieces, and of every chunk of them."""

    def __init__(self) -> None:
        self._sha256, self._chunk = hashlib.sha256(), hashlib.sha256()
        self._num_bytes = 0
        self._chunks: list[str] = []  # sha256 of the full ones

    def update(self, data: bytes | memoryview) -> None:
        self._sha256.update(data)
        rest = memoryview(data).cast("B") if memoryview(data).nbytes else memoryview(b"")
        while rest:
            part = rest[: CHUNK_BYTES - self._num_bytes % CHUNK_BYTES]
            self._chunk.update(part)
            self._num_bytes += len(part)
            if self._num_bytes % CHUNK_BYTES == 0:
                self._chunks.append(self._chunk.hexdigest())
                self._chunk = hashlib.sha256()
            rest = rest[len(part) :]

    def entry(self) -> dict[str, Any]:
        """What a manifest says of a file with these bytes."""
        chunks = [*self._chunks, *([self._chunk.hexdigest()] if self._num_bytes % CHUNK_BYTES else [])]
        whole = {"bytes": self._num_bytes, "sha256": self._sha256.hexdigest()}
        return whole | {"chunk_bytes": CHUNK_BYTES, "chunks": chunks}


class _HashedFile:
    """A new binary file that is hashed as it is written."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._hashes = _Hashes()

    def write(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._hashes.update(data)

    def finish(self) -> dict[str, Any]:
        """Flush the file to disk and close it; its manifest entry."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return self._hashes.entry()

    def close(self) -> None:
        self._file.close()


def write_hashed(path: Path, content: bytes) -> dict[str, Any]:
    """Write a whole file and flush it to disk; its manifest entry."""
    with closing(_HashedFile(path)) as file:
        file.write(content)
        return file.finish()


def flush_hashed(path: Path) -> dict[str, Any]:
    """Flush a file that was written otherwise to disk, and read it; its manifest entry."""
    hashes = _Hashes()
    with path.open("rb") as file:
        os.fsync(file.fileno())
        while block := file.read(_READ_BYTES):
            hashes.update(block)
            made_progress()
    return hashes.entry()


class TokenStore:
    """A finished store, memory-mapped: opening takes the same time and memory whatever its size.

    `tokens` uint16|int32 [T]; `lengths` int32 per document; `answers` uint8 [T] or `classes` int32 [num_documents] for
    tasks with labels."""

    def __init__(self, folder: Path, manifest: StoreManifest) -> None:
        self.folder = folder
        self.manifest = manifest
        dtype = np.dtype(manifest.dtype)
        self.num_documents = n = manifest.num_documents
        self.num_tokens = manifest.num_tokens
        self.tokens: np.ndarray = _mapped(folder / BIN, dtype) if manifest.num_tokens else np.zeros(0, dtype)
        self.answers = self._labels("answers")
        self.classes = self._labels("classes")
        index = _mapped(folder / IDX, np.dtype(np.uint8))
        at = HEADER.itemsize
        self.lengths: np.ndarray = np.frombuffer(index, "<i4", n, at)
        self._pointers: np.ndarray = np.frombuffer(index, "<i8", n, at + 4 * n)  # in bytes; read one at a time

    @classmethod
    def open(cls, folder: str | Path, verify: bool = False) -> TokenStore:
        """Open a store after checking its manifest, sizes and index; `verify` also hashes every byte.

        Raises:
            DataError: the store is incomplete or damaged.
            StorageError: the file system does not answer: neither good nor damaged.
        """
        folder = Path(folder)
        manifest = read_store_manifest(folder)
        for name, expected in manifest.files.items():
            check_file(folder / name, expected)
        _check_index(folder / IDX, manifest)
        store = cls(folder, manifest)
        last = store.num_documents - 1
        end = store.start_of(last) + int(store.lengths[last]) if store.num_documents else 0
        if end != manifest.num_tokens:
            raise damaged(folder / IDX, f"documents end at token {end}, not {manifest.num_tokens} as in the manifest")
        if verify:
            check_chunks(store.chunks())
        return store

    def chunks(self) -> list[Chunk]:
        """Every byte of the store in parts, with their hashes; of a store of format 1 whole files.

        Raises:
            DataError: the manifest does not have a hash for every part.
        """
        return chunks_of(self.folder, self.manifest.files)

    @property
    def place(self) -> list[list[int]]:
        """As `place_of` its files."""
        return place_of(self.folder, self.manifest.files)

    def _labels(self, kind: LabelKind) -> np.ndarray | None:
        if self.manifest.label_kind != kind:
            return None
        name, dtype = LABEL_FILES[kind]
        if not self.num_tokens:
            return np.zeros(0, dtype)
        return _mapped(self.folder / name, dtype)

    def start_of(self, document: int) -> int:
        """Where a document begins in `tokens`."""
        return int(self._pointers[document]) // self.tokens.itemsize

    def documents_between(self, start: int, stop: int) -> tuple[int, np.ndarray]:
        """(first document, int64 [n + 1]) of the n documents with a token in [start, stop) of `tokens`: where each
        begins, and where the last ends."""
        documents = range(self.num_documents)
        first = bisect_right(documents, start, key=self.start_of) - 1
        last = bisect_left(documents, stop, key=self.start_of)
        ends = np.cumsum(self.lengths[first:last], dtype=np.int64)
        return first, self.start_of(first) + np.concatenate([ends[:0], [0], ends])

    def document(self, index: int) -> np.ndarray:
        """The token ids of one document, its EOS included."""
        start = self.start_of(index)
        return self.tokens[start : start + int(self.lengths[index])]

    def find_token_at_least(self, limit: int) -> tuple[int, int] | None:
        """The first (document, token id) with id >= limit, reading in chunks; None if there is none."""
        if self.manifest.max_token_id < limit:
            return None
        for start in range(0, self.num_tokens, _CHUNK):
            hits = np.flatnonzero(self.tokens[start : start + _CHUNK] >= limit)
            if len(hits):
                at = start + int(hits[0])
                document = bisect_right(range(self.num_documents), at, key=self.start_of) - 1
                return document, int(self.tokens[at])
        return None


def _mapped(path: Path, dtype: np.dtype) -> np.ndarray:
    return patiently(path, lambda: np.memmap(path, dtype=dtype, mode="r"), expected=True)


def largest_id(ids: np.ndarray, vocab_size: int) -> int:
    """The largest of token ids int [T], at least one.

    Raises:
        DataError: names one that is outside the vocabulary.
    """
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        invalid = low if low < 0 else high
        raise DataError(f"token id {invalid} is outside the tokenizer's vocabulary of {vocab_size}")
    return high


def damaged(path: Path, what: str) -> DataError:
    """The error of a store's file that is not what its manifest says."""
    return DataError(
        f"token store: {path}: {what}", remedy="dist-cpt prepare RECIPE sets the store aside and makes it again"
    )


def read_store_manifest(folder: Path) -> StoreManifest:
    """The manifest of a finished store.

    Raises:
        DataError: missing or damaged.
        StorageError: the file system does not answer.
    """
    path = folder / MANIFEST
    try:
        values = json.loads(read_bytes(path, expected=is_there(folder)))
    except FileNotFoundError:
        raise DataError(
            f"token store: {folder} has no {MANIFEST}", remedy="run dist-cpt prepare on the recipe first"
        ) from None
    except (OSError, ValueError) as error:
        raise damaged(path, f"unreadable ({error})") from None
    version = values.get("format_version") if isinstance(values, dict) else None
    if version not in _READ_VERSIONS:
        raise damaged(path, f"format version {version!r}, expected {' or '.join(map(str, _READ_VERSIONS))}")
    try:
        manifest = StoreManifest(**values)
        complete = {BIN, IDX} <= manifest.files.keys() and manifest.dtype in ("uint16", "int32")
    except (TypeError, AttributeError) as error:
        raise damaged(path, f"invalid manifest ({error})") from None
    if not complete:
        raise damaged(path, f"dtype {manifest.dtype!r}, files {sorted(manifest.files)}")
    return manifest


def check_file(path: Path, expected: dict[str, Any]) -> None:
    """Compare a file's size with its manifest entry.

    Raises:
        DataError: it is missing or has another size.
    """
    try:
        with PatientFile(path, expected=True) as file:
            size = file.num_bytes()
    except OSError as error:
        raise damaged(path, f"missing or not a file ({error.strerror})") from None
    if size != expected["bytes"]:
        raise damaged(path, f"{size} bytes, expected {expected['bytes']} from the manifest")


def _check_index(path: Path, manifest: StoreManifest) -> None:
    dtype = np.dtype(manifest.dtype)
    n = manifest.num_documents
    raw = read_bytes(path, num_bytes=HEADER.itemsize)
    if len(raw) < HEADER.itemsize or not raw.startswith(MAGIC):
        raise damaged(path, "does not start with MMIDIDX")
    header = np.frombuffer(raw, HEADER)[0]
    actual = tuple(int(header[key]) for key in ("version", "dtype", "sequences", "documents"))
    expected = (INDEX_VERSION, DTYPE_CODES[dtype], n, n + 1)
    if actual != expected:
        raise damaged(path, f"(version, dtype, sequences, documents) is {actual}, expected {expected}")
    size = HEADER.itemsize + n * 4 + n * 8 + (n + 1) * 8
    if (found := manifest.files[IDX]["bytes"]) != size:
        raise damaged(path, f"{found} bytes, {n} documents take {size}")
    sizes = {BIN: manifest.num_tokens * dtype.itemsize}
    if manifest.label_kind is not None:
        name, label_dtype = LABEL_FILES[manifest.label_kind]
        sizes[name] = (n if manifest.label_kind == "classes" else manifest.num_tokens) * label_dtype.itemsize
    for name, size in sizes.items():
        if manifest.files[name]["bytes"] != size:
            raise damaged(path.with_name(name), f"{n} documents of {manifest.num_tokens} tokens take {size} bytes")
