"""Texts with a class -> token ids and a class per document.

The ids are those that the tokenizer gives when it is called on the text, its own special tokens included and no EOS
added, so that whoever classifies the same text later feeds the same ids. The class stands at the last token that is
not padding; where the tokenizer itself ends a text with its padding token, that token is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dist_cpt.config.schema import ClassifyConfig, SourceConfig, ValidationConfig
from dist_cpt.data.labelled import Labelled, Tokeniser, gather
from dist_cpt.data.sources import BadRecord, Parse, Record, field_of, json_object, string_field
from dist_cpt.data.store import LabelKind

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Example = tuple[str, int]


class ExampleEncoder:
    """(text, class) -> ids and the class."""

    label_kind: LabelKind = "classes"

    def __init__(self, tokenizer: PreTrainedTokenizerFast, classify: ClassifyConfig, seq_len: int) -> None:
        self._tokenise = Tokeniser(tokenizer, add_special_tokens=True)
        self._pad_id = tokenizer.pad_token_id
        self._classify = classify
        self._numbers = {name: number for number, name in enumerate(classify.labels)}
        self._seq_len = seq_len
        self.identity: dict[str, Any] = classify.model_dump(mode="json") | {"seq_len": seq_len, "pad_id": self._pad_id}

    def fields(self, source: SourceConfig | ValidationConfig) -> list[str]:
        return [*(self._classify.text_fields or (source.text,)), self._classify.label]

    def parser(self, source: SourceConfig | ValidationConfig) -> Parse[Example]:
        *texts, label = self.fields(source)

        def parse(raw: bytes, is_json: bool) -> Example | None:
            if not is_json:
                raise BadRecord("no_class", "texts with a class are read from .jsonl alone")
            record = json_object(raw)
            number = self._class(field_of(record, label))
            text = self._classify.separator.join(string_field(record, field) for field in texts)
            return None if not text or text.isspace() else (text, number)

        return parse

    def __call__(self, records: Sequence[Record[Example]]) -> Labelled:
        ids, classes = [], []
        bad: list[tuple[Record[Example], BadRecord]] = []
        texts = [record.value[0] for record in records]
        for record, document in zip(records, self._tokenise(texts), strict=True):
            while document and document[-1] == self._pad_id:
                document.pop()
            if len(document) > self._seq_len and self._classify.truncate:
                document = document[: self._seq_len]
            if len(document) > self._seq_len:
                detail = f"{len(document)} tokens, more than data.seq_len {self._seq_len}"
                bad.append((record, BadRecord("too_long", f"{detail}; classify.truncate would cut it")))
            elif not document:
                bad.append((record, BadRecord("no_token", "the tokenizer makes no token of it")))
            else:
                ids.append(document)
                classes.append([record.value[1]])
        return gather(ids, classes, bad)

    def _class(self, value: Any) -> int:
        if self._numbers:
            if isinstance(value, str) and value in self._numbers:
                return self._numbers[value]
            raise BadRecord("unknown_class", f"class {value!r} is not in classify.labels {list(self._numbers)[:8]}")
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < self._classify.num_classes:
            return value
        raise BadRecord("unknown_class", f"class {value!r} is no number from 0 to {self._classify.num_classes - 1}")
