"""Token ids on disk: Megatron-LM's .bin/.idx pair, and a manifest with sizes, counts and hashes.

Source: Megatron-LM, megatron/core/datasets/indexed_dataset.py (MMIDIDX, version 1).
"""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dist_cpt.errors import DataError
from dist_cpt.run_folder.json_files import fsync_path
from dist_cpt.run_folder.names import MANIFEST

MAGIC = b"MMIDIDX\x00\x00"
INDEX_VERSION = 1
FORMAT_VERSION = 1
HEADER = np.dtype([("magic", "S9"), ("version", "<u8"), ("dtype", "u1"), ("sequences", "<u8"), ("documents", "<u8")])
# Megatron-LM's codes of the two integer types it picks by vocabulary size.
DTYPE_CODES = {np.dtype(np.uint16): 8, np.dtype(np.int32): 4}
UINT16_VOCABULARY = 65500
BIN, IDX, QUARANTINE = "tokens.bin", "tokens.idx", "quarantine.jsonl"
LabelKind = Literal["answers", "classes"]
# Labels beside the tokens: per token whether it is part of an answer (0 or 1), or per document its class.
LABEL_FILES: dict[LabelKind, tuple[str, np.dtype]] = {
    "answers": ("answers.bin", np.dtype(np.uint8)),
    "classes": ("classes.bin", np.dtype("<i4")),
}
_CHUNK = 1 << 20  # index entries, and bytes while hashing


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
    files: dict[str, dict[str, Any]]  # name -> {bytes, sha256}
    source: dict[str, Any]  # name, path, field, policy
    counts: dict[str, Any]  # records, blank lines, empty, bad by reason ...
    inputs: list[dict[str, Any]]  # [{path, bytes, mtime_ns}]

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


class StoreWriter:
    """Writes one store into an existing, empty folder; it is complete only after `finish`."""

    def __init__(self, folder: Path, vocab_size: int, label_kind: LabelKind | None = None) -> None:
        self.num_documents = 0
        self._folder = folder
        self._vocab_size = vocab_size
        self._dtype = token_dtype(vocab_size)
        self._num_tokens = 0
        self._max_token_id = -1
        self._lengths: list[np.ndarray] = []  # 4 bytes per document stay in memory, the tokens do not
        self._bin = _HashedFile(folder / BIN)
        self._label_kind: LabelKind | None = label_kind
        self._labels = None if label_kind is None else _HashedFile(folder / LABEL_FILES[label_kind][0])

    def append(self, ids: np.ndarray, lengths: np.ndarray, labels: np.ndarray | None = None) -> None:
        """Add documents: ids int [T] in a row, lengths int32 [num_documents] that sum to T, and in a store with
        labels these: answers [T] or classes [num_documents].

        Raises:
            DataError: an id outside the vocabulary.
        """
        if not len(ids):
            return
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self._vocab_size:
            invalid = low if low < 0 else high
            raise DataError(f"token id {invalid} is outside the tokenizer's vocabulary of {self._vocab_size}")
        self._bin.write(np.ascontiguousarray(ids, dtype=self._dtype).data)
        self._lengths.append(np.asarray(lengths, dtype=np.int32))
        self.num_documents += len(lengths)
        self._num_tokens += len(ids)
        self._max_token_id = max(self._max_token_id, high)
        if self._label_kind is not None and self._labels is not None:
            expected = len(ids) if self._label_kind == "answers" else len(lengths)
            if labels is None or len(labels) != expected:
                raise ValueError(f"a store of {self._label_kind} takes {expected} labels here")
            self._labels.write(np.ascontiguousarray(labels, dtype=LABEL_FILES[self._label_kind][1]).data)

    def finish(
        self, tokenizer_hash: str, source: dict[str, Any], counts: dict[str, Any], inputs: list[dict[str, Any]]
    ) -> None:
        """Write the index, then the manifest as the last file, all flushed to disk."""
        files = {BIN: self._bin.finish(), IDX: self._write_index()}
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
        )
        file = _HashedFile(self._folder / MANIFEST)
        file.write(json.dumps(asdict(manifest), indent=1).encode("utf-8"))
        file.finish()
        fsync_path(self._folder)

    def close(self) -> None:
        """Close the files, finished or not."""
        self._bin.close()
        if self._labels is not None:
            self._labels.close()

    def _write_index(self) -> dict[str, Any]:
        lengths = np.concatenate(self._lengths) if self._lengths else np.zeros(0, np.int32)
        header = np.zeros((), HEADER)
        header["magic"], header["version"], header["dtype"] = MAGIC, INDEX_VERSION, DTYPE_CODES[self._dtype]
        # One sequence per document; the document index has one entry more than there are documents.
        header["sequences"], header["documents"] = len(lengths), len(lengths) + 1
        with closing(_HashedFile(self._folder / IDX)) as file:
            # numpy drops trailing NULs of an S9 when read, but stores all nine bytes.
            file.write(header.tobytes())
            file.write(lengths.astype("<i4").tobytes())
            pointer = 0
            for start in range(0, len(lengths), _CHUNK):
                sizes = lengths[start : start + _CHUNK].astype("<i8") * self._dtype.itemsize
                ends = pointer + np.cumsum(sizes)
                file.write((ends - sizes).tobytes())
                pointer = int(ends[-1])
            for start in range(0, len(lengths) + 1, _CHUNK):
                file.write(np.arange(start, min(start + _CHUNK, len(lengths) + 1), dtype="<i8").tobytes())
            return file.finish()


class _HashedFile:
    """A new binary file that is hashed as it is written."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._sha256 = hashlib.sha256()
        self._num_bytes = 0

    def write(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._sha256.update(data)
        self._num_bytes += memoryview(data).nbytes

    def finish(self) -> dict[str, Any]:
        """Flush the file to disk and close it; its manifest entry."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return {"bytes": self._num_bytes, "sha256": self._sha256.hexdigest()}

    def close(self) -> None:
        self._file.close()


class TokenStore:
    """A finished store, memory-mapped. `tokens` uint16|int32 [T]; `lengths` int32 and `starts` int64 per document;
    `answers` uint8 [T] or `classes` int32 [num_documents] for tasks with labels."""

    def __init__(self, folder: Path, manifest: StoreManifest) -> None:
        self.folder = folder
        self.manifest = manifest
        dtype = np.dtype(manifest.dtype)
        self.num_documents = n = manifest.num_documents
        self.num_tokens = manifest.num_tokens
        self.tokens: np.ndarray = (
            np.memmap(folder / BIN, dtype=dtype, mode="r") if manifest.num_tokens else np.zeros(0, dtype)
        )
        self.answers = self._labels("answers")
        self.classes = self._labels("classes")
        index = np.memmap(folder / IDX, dtype=np.uint8, mode="r")
        at = HEADER.itemsize
        self.lengths: np.ndarray = np.frombuffer(index, "<i4", n, at)
        # The pointers are at an odd offset; arithmetic on a copy is faster than unaligned reads.
        self.starts: np.ndarray = np.frombuffer(index, "<i8", n, at + 4 * n) // dtype.itemsize

    @classmethod
    def open(cls, folder: str | Path, verify: bool = False) -> TokenStore:
        """Open a store after checking its manifest, sizes and index; `verify` also hashes every byte.

        Raises:
            DataError: the store is incomplete or damaged.
        """
        folder = Path(folder)
        manifest = _read_manifest(folder)
        for name, expected in manifest.files.items():
            _check_file(folder / name, expected, verify)
        _check_index(folder / IDX, manifest)
        store = cls(folder, manifest)
        if int(store.lengths.sum(dtype=np.int64)) != manifest.num_tokens:
            raise _damaged(folder / IDX, f"lengths do not sum to the {manifest.num_tokens} tokens of the manifest")
        return store

    def _labels(self, kind: LabelKind) -> np.ndarray | None:
        if self.manifest.label_kind != kind:
            return None
        name, dtype = LABEL_FILES[kind]
        if not self.num_tokens:
            return np.zeros(0, dtype)
        return np.memmap(self.folder / name, dtype=dtype, mode="r")

    def document(self, index: int) -> np.ndarray:
        """The token ids of one document, its EOS included."""
        start = int(self.starts[index])
        return self.tokens[start : start + int(self.lengths[index])]

    def find_token_at_least(self, limit: int) -> tuple[int, int] | None:
        """The first (document, token id) with id >= limit, reading in chunks; None if there is none."""
        if self.manifest.max_token_id < limit:
            return None
        for start in range(0, self.num_tokens, _CHUNK):
            hits = np.flatnonzero(self.tokens[start : start + _CHUNK] >= limit)
            if len(hits):
                at = start + int(hits[0])
                return int(np.searchsorted(self.starts, at, side="right")) - 1, int(self.tokens[at])
        return None


def _damaged(path: Path, what: str) -> DataError:
    return DataError(f"token store: {path}: {what}", remedy="delete the store's folder and prepare again")


def _read_manifest(folder: Path) -> StoreManifest:
    path = folder / MANIFEST
    try:
        values = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DataError(
            f"token store: {folder} has no {MANIFEST}", remedy="run dist-cpt prepare on the recipe first"
        ) from None
    except (OSError, ValueError) as error:
        raise _damaged(path, f"unreadable ({error})") from None
    version = values.get("format_version") if isinstance(values, dict) else None
    if version != FORMAT_VERSION:
        raise _damaged(path, f"format version {version!r}, expected {FORMAT_VERSION}")
    try:
        manifest = StoreManifest(**values)
        complete = {BIN, IDX} <= manifest.files.keys() and manifest.dtype in ("uint16", "int32")
    except (TypeError, AttributeError) as error:
        raise _damaged(path, f"invalid manifest ({error})") from None
    if not complete:
        raise _damaged(path, f"dtype {manifest.dtype!r}, files {sorted(manifest.files)}")
    return manifest


def _check_file(path: Path, expected: dict[str, Any], verify: bool) -> None:
    if not path.is_file():
        raise _damaged(path, "missing")
    size = path.stat().st_size
    if size != expected["bytes"]:
        raise _damaged(path, f"{size} bytes, expected {expected['bytes']} from the manifest")
    if not verify:
        return
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != expected["sha256"]:
        raise _damaged(path, f"sha256 {digest[:12]}..., expected {expected['sha256'][:12]}... from the manifest")


def _check_index(path: Path, manifest: StoreManifest) -> None:
    dtype = np.dtype(manifest.dtype)
    n = manifest.num_documents
    with path.open("rb") as file:
        raw = file.read(HEADER.itemsize)
    if len(raw) < HEADER.itemsize or not raw.startswith(MAGIC):
        raise _damaged(path, "does not start with MMIDIDX")
    header = np.frombuffer(raw, HEADER)[0]
    actual = tuple(int(header[key]) for key in ("version", "dtype", "sequences", "documents"))
    expected = (INDEX_VERSION, DTYPE_CODES[dtype], n, n + 1)
    if actual != expected:
        raise _damaged(path, f"(version, dtype, sequences, documents) is {actual}, expected {expected}")
    size = HEADER.itemsize + n * 4 + n * 8 + (n + 1) * 8
    if path.stat().st_size != size:
        raise _damaged(path, f"{path.stat().st_size} bytes, {n} documents take {size}")
    sizes = {BIN: manifest.num_tokens * dtype.itemsize}
    if manifest.label_kind is not None:
        name, label_dtype = LABEL_FILES[manifest.label_kind]
        sizes[name] = (n if manifest.label_kind == "classes" else manifest.num_tokens) * label_dtype.itemsize
    for name, size in sizes.items():
        if manifest.files[name]["bytes"] != size:
            raise _damaged(path.with_name(name), f"{n} documents of {manifest.num_tokens} tokens take {size} bytes")
