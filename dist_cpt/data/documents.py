"""The documents of a token store, or of another's Megatron-LM pair, by number: as token ids and as text."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from dist_cpt.data.megatron import MegatronPair
from dist_cpt.data.store import BIN, IDX, TOKENIZER, StoreManifest, TokenStore
from dist_cpt.data.token_ids import unpadded_copy
from dist_cpt.data.tokenizer import load_tokenizer, tokenizer_hash
from dist_cpt.errors import ConfigError, DataError
from dist_cpt.run_folder.names import MANIFEST
from dist_cpt.run_folder.staging import new_output
from dist_cpt.storage import is_there

_CHUNK = 1 << 20  # documents


@dataclass(frozen=True)
class Documents:
    """What can be read by number; without `manifest` nothing is known about the tokens but themselves."""

    place: Path  # the store's folder, or the pair's .idx
    source: TokenStore | MegatronPair
    manifest: StoreManifest | None

    def __len__(self) -> int:
        return self.source.num_documents

    @property
    def dtype(self) -> np.dtype:
        return self.source.tokens.dtype if isinstance(self.source, TokenStore) else self.source.dtype

    def lengths(self) -> Iterator[np.ndarray]:
        """Tokens of every document, int64, a part of the documents at a time."""
        for first in range(0, len(self), _CHUNK):
            last = min(first + _CHUNK, len(self))
            if isinstance(self.source, TokenStore):
                yield self.source.lengths[first:last].astype(np.int64)
            else:
                yield self.source.lengths(first, last)


def open_documents(path: Path) -> Documents:
    """Open a store's folder, or a Megatron-LM pair by its .idx, its .bin, their common prefix, or a folder with
    ours but without a manifest.

    Raises:
        DataError: there is none, or it is damaged.
        StorageError: the file system does not answer.
    """
    if is_there(path / MANIFEST):
        store = TokenStore.open(path)
        return Documents(path, store, store.manifest)
    index = next(
        (index for index in (path / IDX, path.with_suffix(".idx"), Path(f"{path}.idx")) if is_there(index)), None
    )
    if index is None:
        raise DataError(
            f"{path} is no token store: no {MANIFEST} in it, no {path.with_suffix('.idx').name} beside it",
            remedy="give a folder that dist-cpt prepare made, or the .idx of a Megatron-LM pair",
        )
    try:
        return Documents(index, MegatronPair(index), None)
    except (ValueError, FileNotFoundError) as error:
        raise DataError(f"{index}: {error}", remedy=f"the pair is the .idx and its {BIN.rpartition('.')[2]}") from None


class Decoder:
    """Turns a store's documents back into text, as the tokenizer's own decoder does."""

    def __init__(self, documents: Documents, tokenizer: str | None = None) -> None:
        """Uses the tokenizer in the store; `tokenizer`, a folder or hub id, where there is none.

        Raises:
            ConfigError: there is no tokenizer.
            DataError: it cannot be loaded, or is not the one that the store was made with.
        """
        self._documents = documents
        manifest = documents.manifest
        self._bos = self._eos = None
        if tokenizer is not None:
            loaded: Any = load_tokenizer(tokenizer)
            if manifest is not None and (found := tokenizer_hash(loaded)) != manifest.tokenizer_hash:
                raise DataError(
                    f"{documents.place} was made with the tokenizer {manifest.tokenizer_hash[:12]}, {tokenizer} is "
                    f"{found[:12]}",
                    remedy="give the tokenizer that the store was made with",
                )
            self._backend = unpadded_copy(loaded.backend_tokenizer)
            self._bos, self._eos = loaded.bos_token_id, loaded.eos_token_id
        elif manifest is not None and TOKENIZER in manifest.files:
            from tokenizers import Tokenizer

            self._backend = Tokenizer.from_file(str(documents.place / TOKENIZER))
        else:
            raise ConfigError(f"{documents.place} has no {TOKENIZER}", remedy="name it: --tokenizer FOLDER")
        if manifest is not None:
            self._bos, self._eos = manifest.source.get("bos"), manifest.source.get("eos", self._eos)

    def row(self, number: int) -> dict[str, Any]:
        """One document as a JSON-able row: its text, and in a store with labels the answers or the class.

        Of plain text the BOS and EOS that `prepare` added are left out; what a task's template wrote stays.
        """
        ids = self._documents.source.document(number)
        manifest, source = self._documents.manifest, self._documents.source
        if manifest is None or manifest.label_kind is None:
            first = int(len(ids) > 0 and self._bos is not None and int(ids[0]) == self._bos)
            last = len(ids) - int(len(ids) > first and self._eos is not None and int(ids[-1]) == self._eos)
            return {"text": self.text(ids[first:last])}
        assert isinstance(source, TokenStore)
        if source.classes is not None:
            return {"text": self.text(ids), "class": int(source.classes[number])}
        assert source.answers is not None
        start = source.start_of(number)
        is_answer = np.diff(source.answers[start : start + len(ids)].astype(np.int8), prepend=0, append=0)
        borders = np.flatnonzero(is_answer).tolist()
        return {"text": self.text(ids), "answers": [self.text(ids[a:b]) for a, b in list(pairwise(borders))[::2]]}

    def text(self, ids: np.ndarray) -> str:
        """The text of token ids, special tokens spelled out."""
        return self._backend.decode(ids.tolist(), skip_special_tokens=False)


def decode_rows(documents: Documents, wanted: str = ":", tokenizer: str | None = None) -> Iterator[str]:
    """Lines of jsonl: the rows of the documents `A:B`, a slice as in Python.

    Raises:
        ConfigError: no such slice, or no tokenizer.
        DataError: as `Decoder`; a document is cut off.
    """
    try:
        first, last = (int(part) if part else None for part in wanted.split(":"))
    except ValueError:
        raise ConfigError(f"--documents {wanted}: give A:B, such as 0:100") from None
    decoder, numbers = Decoder(documents, tokenizer), range(len(documents))[first:last]

    def rows() -> Iterator[str]:
        for number in numbers:
            try:
                row = decoder.row(number)
            except ValueError as error:
                raise DataError(f"{documents.place}: {error}") from None
            yield json.dumps(row, ensure_ascii=False) + "\n"

    return rows()


def write_rows(rows: Iterator[str], out: Path) -> int:
    """Write lines into the new file `out`, which appears when it is complete; their number.

    Raises:
        ConfigError: `out` exists.
        WriteError: it cannot be written.
    """
    if os.path.lexists(out):
        raise ConfigError(f"--out {out} exists", remedy="name a new file")
    number = 0
    with new_output(out) as work, work.open("x", encoding="utf-8", newline="\n") as file:
        for number, row in enumerate(rows, start=1):  # noqa: B007
            file.write(row)
        file.flush()
        os.fsync(file.fileno())
    return number
