"""Records with labels -> token ids beside their labels: what the encoders of tasks other than cpt have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from dist_cpt.config.schema import SourceConfig, ValidationConfig
from dist_cpt.data.sources import BadRecord, Parse, Record
from dist_cpt.data.store import LabelKind

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Labelled:
    """Some documents: `ids` int32 [T] in a row, `lengths` int32 [num_documents], `labels` as the store keeps them,
    and the records that turned out to be bad, with the reason."""

    ids: np.ndarray
    lengths: np.ndarray
    labels: np.ndarray
    bad: list[tuple[Record[Any], BadRecord]]


class LabelledEncoder(Protocol):
    """Safe to call from several threads. Every record becomes one document or a bad record."""

    label_kind: LabelKind
    identity: dict[str, Any]  # what, beside text and tokenizer, decides the ids and labels; plain values

    def parser(self, source: SourceConfig | ValidationConfig) -> Parse[Any]:
        """How the records of a source are read."""
        ...

    def fields(self, source: SourceConfig | ValidationConfig) -> list[str]:
        """The fields of a source's records that are read."""
        ...

    def __call__(self, records: Sequence[Record[Any]]) -> Labelled: ...


class Tokeniser:
    """Texts -> token ids, by a copy of a tokenizer that nobody else changes."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, add_special_tokens: bool) -> None:
        from tokenizers import Tokenizer

        self._backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._backend.no_truncation()
        self._backend.no_padding()
        self._add_special_tokens = add_special_tokens

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=self._add_special_tokens)
        return [encoding.ids for encoding in encodings]


def gather(
    ids: Sequence[Sequence[int]], labels: Sequence[Sequence[int]], bad: list[tuple[Record[Any], BadRecord]]
) -> Labelled:
    """The documents in a row; `labels` of one document are its tokens' answers, or its class alone."""
    return Labelled(
        np.array([token for document in ids for token in document], dtype=np.int32),
        np.array([len(document) for document in ids], dtype=np.int32),
        np.array([label for document in labels for label in document], dtype=np.int32),
        bad,
    )
