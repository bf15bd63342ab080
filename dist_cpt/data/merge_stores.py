"""Several token stores -> one, with where each part came from; tokens and labels are copied as they are."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from dist_cpt.data.store import QUARANTINE, TOKENIZER, StoreManifest, StoreWriter, TokenStore
from dist_cpt.errors import ConfigError, DataError
from dist_cpt.run_folder.staging import new_output
from dist_cpt.runtime.liveness import made_progress

_DOCUMENTS = 1 << 16  # copied at a time; their tokens are mapped, not read into memory

# What all parts must have in common, by its name in the error message.
_SAME: dict[str, Callable[[StoreManifest], Any]] = {
    "tokenizer": lambda manifest: manifest.tokenizer_hash[:12],
    "vocabulary": lambda manifest: manifest.vocab_size,
    "labels": lambda manifest: manifest.label_kind,
    "BOS": lambda manifest: manifest.source.get("bos"),
    "task settings": lambda manifest: manifest.source.get("labels"),
}


def merge_stores(folders: Sequence[Path], out: Path) -> TokenStore:
    """Write the documents of all stores, in the order given, into the new store `out`.

    The new folder appears when it is complete; an interruption leaves nothing.

    Raises:
        ConfigError: `out` exists, or fewer than two stores are given.
        DataError: a store is damaged, or was made otherwise than the first.
        WriteError: `out` cannot be written.
    """
    if len(folders) < 2:
        raise ConfigError("data merge takes two or more stores")
    if os.path.lexists(out):
        raise ConfigError(f"--out {out} exists", remedy="name a new folder")
    stores = [TokenStore.open(folder) for folder in folders]
    _require_alike(stores)
    with new_output(out) as work:
        work.mkdir()
        _write(stores, work, out.name)
    return TokenStore.open(out)


def _require_alike(stores: Sequence[TokenStore]) -> None:
    first = stores[0]
    for other in stores[1:]:
        for name, value_of in _SAME.items():
            expected, found = value_of(first.manifest), value_of(other.manifest)
            if found != expected:
                difference = f"{name} {_short(found)}, not {_short(expected)}"
                raise DataError(
                    f"{other.folder} cannot be merged with {first.folder}: {difference}",
                    remedy="prepare both with the same tokenizer and task",
                )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _write(stores: Sequence[TokenStore], work: Path, name: str) -> None:
    manifest = stores[0].manifest
    with closing(StoreWriter(work, manifest.vocab_size, manifest.label_kind)) as writer:
        for store in stores:
            _copy(store, writer)
        shared = {key: value for key, value in manifest.source.items() if key in ("bos", "eos", "labels")}
        parts = [
            {"content_hash": store.manifest.content_hash, "documents": store.num_documents, "tokens": store.num_tokens}
            | store.manifest.source
            | {"counts": store.manifest.counts}
            for store in stores
        ]
        counts = _sum([store.manifest.counts for store in stores])
        inputs = [file for store in stores for file in store.manifest.inputs]
        source = {"name": name, "path": None, "merged": parts} | shared
        writer.finish(manifest.tokenizer_hash, source, counts, inputs, tokenizer=_tokenizer(stores))
    _join_quarantines(stores, work / QUARANTINE)


def _copy(store: TokenStore, writer: StoreWriter) -> None:
    at = 0
    for first in range(0, store.num_documents, _DOCUMENTS):
        lengths = store.lengths[first : first + _DOCUMENTS]
        end = at + int(lengths.sum(dtype=np.int64))
        labels = store.classes[first : first + _DOCUMENTS] if store.classes is not None else None
        if store.answers is not None:
            labels = store.answers[at:end]
        writer.append(store.tokens[at:end], lengths, labels)
        made_progress()
        at = end


def _sum(values: Sequence[Any]) -> Any:
    """The counts of all parts together, also those inside objects; of anything else the first."""
    given = [value for value in values if value is not None]
    if given and isinstance(given[0], dict):
        keys = dict.fromkeys(key for value in given for key in value)
        return {key: _sum([value.get(key) for value in given]) for key in keys}
    if given and isinstance(given[0], int):
        return sum(given)
    return given[0] if given else None


def _tokenizer(stores: Sequence[TokenStore]) -> str | None:
    path = next((store.folder / TOKENIZER for store in stores if TOKENIZER in store.manifest.files), None)
    return None if path is None else path.read_text(encoding="utf-8")


def _join_quarantines(stores: Sequence[TokenStore], target: Path) -> None:
    quarantined = [store.folder / QUARANTINE for store in stores if (store.folder / QUARANTINE).is_file()]
    if quarantined:
        with target.open("wb") as joined:
            for path in quarantined:
                with path.open("rb") as part:
                    shutil.copyfileobj(part, joined)
