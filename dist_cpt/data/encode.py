"""Records -> documents of token ids: what `prepare` asks of every task's encoder, and the encoder of plain text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from dist_cpt.config.schema import SourceConfig, ValidationConfig
from dist_cpt.data.cut_text import Cutter, Piece
from dist_cpt.data.long_text import LongText
from dist_cpt.data.records import BadRecord, RawRecord
from dist_cpt.data.sources import Parse, Record, text_parser
from dist_cpt.data.store import LabelKind
from dist_cpt.data.token_ids import batch_ids, unpadded_copy
from dist_cpt.data.tokenizer import adds_bos

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Source = SourceConfig | ValidationConfig
Rejected = list[tuple[Record[Any], BadRecord]]


@dataclass(frozen=True)
class Encoded:
    """Documents in a row, and the records rejected while encoding."""

    ids: np.ndarray  # int32 [T]
    lengths: np.ndarray  # int32 [num_documents], their sum is T
    labels: np.ndarray | None  # int32: [T] or [num_documents], by the encoder's label_kind; None for plain text
    rejected: Rejected
    continues: bool = False  # the first document is the rest of the last one before


class Encoder(Protocol):
    """Encodes the records of one task. Safe to call from several threads."""

    label_kind: LabelKind | None
    cutter: Cutter | None  # of texts longer than memory; None: a record is in memory as a whole

    def describe(self, source: Source) -> dict[str, Any]:
        """JSON-able: what determines the documents besides text field and tokenizer; part of the store's key."""
        ...

    def parser(self, source: Source) -> Parse[Any]:
        """How to read one record of `source`."""
        ...

    def __call__(self, records: Sequence[Record[Any]]) -> Encoded: ...


class TextEncoder:
    """Plain text, or token ids; every document ends with exactly one EOS, and begins with one BOS if the tokenizer
    begins texts so. Its other special tokens are not added.

    An EOS spelled out in a text ends a document there: at the end of a text it is not doubled, in the middle it
    splits the text in two.
    """

    label_kind: LabelKind | None = None

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._backend = unpadded_copy(tokenizer.backend_tokenizer)
        eos_id = tokenizer.eos_token_id
        assert isinstance(eos_id, int)  # load_tokenizer refuses a tokenizer without one
        self._eos_id = eos_id
        self._bos_id = tokenizer.bos_token_id if adds_bos(tokenizer) else None
        ends = [token for token in (eos_id, self._bos_id) if isinstance(token, int)]
        self.cutter: Cutter | None = Cutter(self._backend, ends)

    def describe(self, source: Source) -> dict[str, Any]:
        return {} if self._bos_id is None else {"bos": self._bos_id}

    def parser(self, source: Source) -> Parse[str | np.ndarray | LongText]:
        read_text = text_parser(source.text)

        def parse(raw: RawRecord) -> str | np.ndarray | LongText | None:
            if isinstance(raw.content, np.ndarray):
                return raw.content if len(raw.content) else None
            return read_text(raw)

        return parse

    def __call__(self, records: Sequence[Record[str | np.ndarray | Piece]]) -> Encoded:
        """Documents; a piece of one comes alone."""
        values = [record.value for record in records]
        if len(values) == 1 and isinstance(values[0], Piece):
            piece = values[0]
            (ids,) = batch_ids(self._backend, [piece.text])
            if piece.last:
                ids.append(self._eos_id)
            return self._documents(np.array(ids, dtype=np.int32), continues=not piece.first)
        flat: list[int] = []
        encoded = iter(batch_ids(self._backend, [value for value in values if isinstance(value, str)]))
        for value in values:
            flat.extend(value.tolist() if isinstance(value, np.ndarray) else next(encoded))
            flat.append(self._eos_id)
        return self._documents(np.array(flat, dtype=np.int32), continues=False)

    def _documents(self, ids: np.ndarray, *, continues: bool) -> Encoded:
        """Ids in a row, divided at every EOS; what follows the last is a document to be continued."""
        is_eos = ids == self._eos_id
        doubled = is_eos.copy()
        doubled[1:] &= is_eos[:-1]
        if continues:
            doubled[:1] = False
        if doubled.any():  # a text that ends with an EOS of its own, or has no token at all
            ids = ids[~doubled]
        ends = np.flatnonzero(ids == self._eos_id) + 1
        if self._bos_id is not None:
            starts = np.concatenate([ends[:0] if continues else np.zeros(1, ends.dtype), ends])
            starts = starts[starts < len(ids)]
            missing = starts[ids[starts] != self._bos_id]  # a text may spell it out
            ids = np.insert(ids, missing, self._bos_id)
            ends = np.flatnonzero(ids == self._eos_id) + 1
        if len(ids) and (not len(ends) or ends[-1] < len(ids)):
            ends = np.append(ends, len(ids))
        return Encoded(ids, np.diff(ends, prepend=0).astype(np.int32), None, [], continues and len(ends) > 0)


def gather(ids: Sequence[Sequence[int]], labels: Sequence[Sequence[int]], rejected: Rejected) -> Encoded:
    """Concatenate documents; `labels` of a document are one value per token, or its class alone."""
    return Encoded(
        np.array([token for document in ids for token in document], dtype=np.int32),
        np.array([len(document) for document in ids], dtype=np.int32),
        np.array([label for document in labels for label in document], dtype=np.int32),
        rejected,
    )
