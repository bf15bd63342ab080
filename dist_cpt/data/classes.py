"""Texts with a class -> token ids and a class per document.

The ids are those of a plain call of the tokenizer on the text, its special tokens included and no EOS added, so that
inference feeds the same ids. The class is predicted at the last token that is not padding; where the tokenizer ends a
text with its padding token, that token is removed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dist_cpt.config.schema import ClassifyConfig
from dist_cpt.data.cut_text import Cutter
from dist_cpt.data.encode import Encoded, Rejected, Source, gather
from dist_cpt.data.records import BadRecord, RawRecord
from dist_cpt.data.sources import Parse, Record, field_of, text_of
from dist_cpt.data.store import LabelKind
from dist_cpt.data.token_ids import batch_ids, unpadded_copy

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Example = tuple[str, int]


class ExampleEncoder:
    """(text, class) -> ids and the class."""

    label_kind: LabelKind | None = "classes"
    cutter: Cutter | None = None

    def __init__(self, tokenizer: PreTrainedTokenizerFast, classify: ClassifyConfig, seq_len: int) -> None:
        self._backend = unpadded_copy(tokenizer.backend_tokenizer)
        self._pad_id = tokenizer.pad_token_id
        self._classify = classify
        self._number_of = {name: number for number, name in enumerate(classify.labels)}
        self._seq_len = seq_len

    def describe(self, source: Source) -> dict[str, Any]:
        settings = self._classify.model_dump(mode="json") | {"seq_len": self._seq_len, "pad_id": self._pad_id}
        return {"fields": self._fields(source), "labels": settings}

    def parser(self, source: Source) -> Parse[Example]:
        *texts, label = self._fields(source)

        def parse(raw: RawRecord) -> Example | None:
            record = raw.fields()
            number = self._class_number(field_of(record, label))
            text = self._classify.separator.join(text_of(record, field) for field in texts)
            return None if not text or text.isspace() else (text, number)

        return parse

    def __call__(self, records: Sequence[Record[Example]]) -> Encoded:
        ids, classes = [], []
        rejected: Rejected = []
        texts = [record.value[0] for record in records]
        for record, document in zip(records, batch_ids(self._backend, texts, special_tokens=True), strict=True):
            while document and document[-1] == self._pad_id:
                document.pop()
            if self._classify.truncate:
                document = document[: self._seq_len]
            if len(document) > self._seq_len:
                detail = f"{len(document)} tokens, more than data.seq_len {self._seq_len}"
                rejected.append((record, BadRecord("too_long", f"{detail}; classify.truncate would cut it")))
            elif not document:
                rejected.append((record, BadRecord("no_token", "the tokenizer returns no token")))
            else:
                ids.append(document)
                classes.append([record.value[1]])
        return gather(ids, classes, rejected)

    def _fields(self, source: Source) -> list[str]:
        return [*(self._classify.text_fields or (source.text,)), self._classify.label]

    def _class_number(self, value: Any) -> int:
        if self._number_of:
            if isinstance(value, str) and value in self._number_of:
                return self._number_of[value]
            raise BadRecord("unknown_class", f"class {value!r} is not in classify.labels {list(self._number_of)[:8]}")
        if isinstance(value, str) and value.isdecimal():  # from a file without types
            value = int(value)
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < self._classify.num_classes:
            return value
        raise BadRecord(
            "unknown_class", f"class {value!r} is not an integer from 0 to {self._classify.num_classes - 1}"
        )
