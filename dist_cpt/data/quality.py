"""What finished stores have twice, or of the held-out sets: found once, kept in files beside the stores.

A store never changes: a document that is excluded gets no block, which is all that excluding it means.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dist_cpt.config.schema import DataConfig
from dist_cpt.data.duplicates import find_duplicates
from dist_cpt.data.overlap import NGRAM, PASSAGE, HeldOutNGrams
from dist_cpt.data.store import TokenStore
from dist_cpt.run_folder.json_files import replace_file
from dist_cpt.storage import read_bytes

_VERSION = 1  # of how documents are compared
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class SourceQuality:
    """What was found in one training source."""

    duplicates: np.ndarray  # int64, ascending: documents that repeat an earlier one of any source
    overlapping: np.ndarray  # int64, ascending: documents with a passage of a held-out document
    shared_ngrams: dict[str, float]  # by held-out set: the fraction of its n-grams that this source has
    excluded: np.ndarray  # int64, ascending: documents that get no block


def examine(data: DataConfig, sources: Sequence[TokenStore], held_out: dict[str, TokenStore]) -> list[SourceQuality]:
    """Compare the training sources with each other and with the held-out sets; the result is read where it was found
    before.

    Raises:
        MissingExtraError: `deduplicate: near` without its library.
        WriteError: data.cache_dir cannot be written.
    """
    assert data.cache_dir is not None
    folder = Path(data.cache_dir)
    duplicates = _duplicates(folder, data, sources)
    ngrams: list[HeldOutNGrams] = []

    def find(store: TokenStore) -> Arrays:
        if not ngrams:  # of all sets, once
            ngrams.append(HeldOutNGrams(list(held_out.values())))
        found = ngrams[0].overlap(store)
        return {"documents": found.documents, "fraction": found.shared / np.maximum(ngrams[0].counts, 1)}

    examined = []
    for store, repeated in zip(sources, duplicates, strict=True):
        overlapping, fractions = np.zeros(0, dtype=np.int64), np.zeros(0)
        if held_out:
            others = [other.manifest.content_hash for other in held_out.values()]
            key = ["overlap", NGRAM, PASSAGE, store.manifest.content_hash, others]
            found = _once(folder, key, lambda store=store: find(store))
            overlapping, fractions = found["documents"], found["fraction"]
        shared = dict(zip(held_out, fractions.tolist(), strict=True))
        excluded = np.union1d(repeated, overlapping) if data.decontaminate == "drop" else repeated
        examined.append(SourceQuality(repeated, overlapping, shared, excluded))
    return examined


def _duplicates(folder: Path, data: DataConfig, sources: Sequence[TokenStore]) -> list[np.ndarray]:
    if data.deduplicate == "none":
        return find_duplicates(sources, "none")
    key = ["duplicates", data.deduplicate, [store.manifest.content_hash for store in sources]]
    names = [str(number) for number in range(len(sources))]
    found = _once(folder, key, lambda: dict(zip(names, find_duplicates(sources, data.deduplicate), strict=True)))
    return [found[name] for name in names]


def _once(folder: Path, key: list, find: Callable[[], Arrays]) -> Arrays:
    """The arrays that were found for `key` before, or now."""
    digest = hashlib.sha256(json.dumps([_VERSION, *key]).encode()).hexdigest()[:12]
    path = folder / f"{key[0]}-{digest}.npz"
    try:
        with np.load(io.BytesIO(read_bytes(path)), allow_pickle=False) as arrays:
            return dict(arrays)
    except (FileNotFoundError, ValueError, EOFError, zipfile.BadZipFile):  # also one that was damaged
        pass
    arrays, content = find(), io.BytesIO()
    np.savez_compressed(content, allow_pickle=False, **arrays)
    os.makedirs(folder, exist_ok=True)
    replace_file(path, content.getvalue())
    return arrays


def excluded_hash(examined: Sequence[SourceQuality]) -> str | None:
    """sha256 of which documents get no block; None where all do."""
    if not any(len(source.excluded) for source in examined):
        return None
    lists = [hashlib.sha256(source.excluded.astype("<i8").tobytes()).hexdigest() for source in examined]
    return hashlib.sha256(json.dumps(lists).encode()).hexdigest()
