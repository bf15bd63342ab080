"""A .bin/.idx pair in the format of Megatron-LM: token ids by document, read on demand.

Source: Megatron-LM, megatron/core/datasets/indexed_dataset.py (MMIDIDX, version 1).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dist_cpt.data.store import HEADER, INDEX_VERSION, MAGIC
from dist_cpt.storage import patiently, read_bytes

DTYPES = {1: np.uint8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}  # by code; the rest are floats
_CHUNK = 1 << 20  # sequences


class MegatronPair:
    """`index` and the .bin beside it, memory-mapped; a document is one or several of their sequences.

    Raises:
        ValueError: not such a pair, or cut off.
        OSError: a file is missing.
        StorageError: the file system does not answer.
    """

    def __init__(self, index: Path) -> None:
        raw = read_bytes(index, num_bytes=HEADER.itemsize)
        if len(raw) < HEADER.itemsize or not raw.startswith(MAGIC):
            raise ValueError("does not start with MMIDIDX")
        header = np.frombuffer(raw, HEADER, 1)[0]
        version, code, sequences, borders = (int(header[key]) for key in ("version", "dtype", "sequences", "documents"))
        if version != INDEX_VERSION or code not in DTYPES:
            raise ValueError(f"version {version} and type {code} are not known")
        self.index, self.dtype = index, np.dtype(DTYPES[code])
        mapped = _mapped(index, np.dtype(np.uint8))
        at = HEADER.itemsize
        self._lengths = np.frombuffer(mapped, "<i4", sequences, at)
        self._pointers = np.frombuffer(mapped, "<i8", sequences, at + 4 * sequences)
        self._borders = np.frombuffer(mapped, "<i8", borders, at + 12 * sequences)
        self.num_documents = max(borders - 1, 0)
        path = index.with_suffix(".bin")
        is_empty = not patiently(path, path.stat, expected=True).st_size
        self._tokens = np.zeros(0, self.dtype) if is_empty else _mapped(path, self.dtype)

    def document(self, number: int) -> np.ndarray:
        """The token ids of one document, of the file's dtype.

        Raises:
            ValueError: the files end inside it.
        """
        first, last = self._borders[number : number + 2].tolist()
        pointers = self._pointers[first:last].tolist()
        lengths = self._lengths[first:last].tolist()
        starts = [pointer // self.dtype.itemsize for pointer in pointers]
        parts = [self._tokens[start : start + length] for start, length in zip(starts, lengths, strict=True)]
        ids = parts[0] if len(parts) == 1 else np.concatenate([self._tokens[:0], *parts])
        if len(ids) != sum(lengths) or len(lengths) != last - first:
            raise ValueError(f"the .bin file ends inside document {number + 1}")
        return ids

    def lengths(self, first: int, last: int) -> np.ndarray:
        """Tokens of the documents from `first` to `last`, int64."""
        borders = self._borders[first : last + 1].astype(np.int64)
        begin, end = (int(borders[0]), int(borders[-1])) if len(borders) else (0, 0)
        before = np.concatenate([[0], np.cumsum(self._lengths[begin:end], dtype=np.int64)])
        return np.diff(before[borders - begin])

    def problems(self) -> list[str]:
        """What of the index does not fit the .bin: the first sequence, and the borders of documents."""
        problems, size = [], len(self._tokens) * self.dtype.itemsize
        for first in range(0, len(self._lengths), _CHUNK):
            starts, lengths = self._pointers[first : first + _CHUNK], self._lengths[first : first + _CHUNK]
            outside = np.flatnonzero((starts < 0) | (lengths < 0) | (starts + lengths * self.dtype.itemsize > size))
            if len(outside):
                problems.append(
                    f"{self.index}: sequence {first + int(outside[0])} is not inside the {size} bytes beside it"
                )
                break
        borders = self._borders.astype(np.int64)
        if not len(borders) or borders[0] or borders[-1] != len(self._lengths) or (np.diff(borders) < 0).any():
            problems.append(f"{self.index}: the documents are not the {len(self._lengths)} sequences in order")
        return problems


def _mapped(path: Path, dtype: np.dtype) -> np.ndarray:
    """All whole items of a file."""
    num_items = patiently(path, path.stat, expected=True).st_size // dtype.itemsize
    return patiently(path, lambda: np.memmap(path, dtype, "r", shape=(num_items,)), expected=True)
