"""How many bytes of text token ids stand for, so that losses under different tokenizers can be compared.

A byte-level token has one character per byte; a SentencePiece token spells a space as U+2581 and a single byte as
<0xNN>. Special tokens stand for no text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dist_cpt.data.batch import IGNORE_INDEX, Batch
from dist_cpt.data.tokenizer import vocabulary_size

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_SPACE = "\u2581"
_ONE_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


@dataclass(frozen=True)
class TextBytes:
    """UTF-8 bytes by token id, as the tokenizer decodes them."""

    sizes: np.ndarray  # int64 [V]
    is_special: np.ndarray  # bool [V]
    added_space: np.ndarray  # bool [V]: tokens with a space that the tokenizer puts before a text

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerFast) -> TextBytes | None:
        """None for a tokenizer that is neither byte-level nor like SentencePiece: its tokens have no size of their
        own."""
        backend = tokenizer.backend_tokenizer
        content = json.loads(backend.to_str())
        parts = set(_types(content["decoder"]))
        byte_level = "ByteLevel" in parts
        if not (byte_level or "Metaspace" in parts or _SPACE in json.dumps(content["decoder"], ensure_ascii=False)):
            return None
        size_of = _byte_level_size if byte_level else _piece_size
        sizes = np.zeros(vocabulary_size(tokenizer), np.int64)
        is_special, added_space = np.zeros(len(sizes), bool), np.zeros(len(sizes), bool)
        begins = backend.encode("a", add_special_tokens=False).tokens[:1] or [""]
        space = begins[0][:1] if begins[0][:1] in (_SPACE, "Ġ") else None  # the text has none
        for token, index in backend.get_vocab(with_added_tokens=True).items():
            sizes[index] = size_of(token)
            added_space[index] = space is not None and token.startswith(space)
        for index, token in backend.get_added_tokens_decoder().items():
            sizes[index] = 0 if token.special else len(token.content.encode())
            is_special[index], added_space[index] = token.special, False
        return cls(sizes, is_special, added_space)

    def of_targets(self, batch: Batch) -> int:
        """Bytes of the text behind the targets of a batch."""
        labels, inputs, positions = (t.numpy() for t in (batch.labels, batch.input_ids, batch.position_ids))
        targets = labels != IGNORE_INDEX
        # The first token after a BOS; without one, the token with the added space is never a target.
        first = targets & (positions == 0) & self.is_special[inputs]
        return int(self.sizes[labels[targets]].sum()) - int(self.added_space[labels[first]].sum())


def _types(part: Any) -> Iterator[str]:
    """The types of a decoder and of those inside it."""
    if isinstance(part, dict):
        yield part.get("type", "")
        for inner in part.get("decoders", ()):
            yield from _types(inner)


def _byte_level_size(token: str) -> int:
    return len(token)


def _piece_size(token: str) -> int:
    return 1 if _ONE_BYTE.fullmatch(token) else len(token.replace(_SPACE, " ").encode())
