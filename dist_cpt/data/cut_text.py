"""A long text in pieces whose tokens, one piece after another, are those of the whole text.

A cut is made before white space or punctuation that follows a letter, where two things hold. The tokenizer's own
normalizer and pre-tokenizer treat a window around it like its two halves; if they do not split text into words at all,
as Gemma's and Llama 2's, no token of the vocabulary may have the two characters at the cut side by side, so that no
merge can cross it. And the tokens of the window are those of its halves. A cut after a line break would not do: how
GPT-2 splits white space depends on what follows it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

PIECE_CHARACTERS = 1 << 16  # several are in the tokenizer at a time
_WINDOWS = (200, 157, 64)  # characters on either side; several, so that nothing depends on where a window begins
_TRIES = 24  # candidates of a kind
_LETTER = r"[^\W\d_]"
_SPACE = re.compile(rf"(?<={_LETTER}) (?={_LETTER})")
_CANDIDATES = (_SPACE, re.compile(rf"(?<={_LETTER})\n(?={_LETTER})"), re.compile(rf"(?<={_LETTER})(?=[^\w\s])"))
# Those that look at a few characters around a border. FixedLength, say, counts from the beginning of the text.
_LOCAL = {
    *("Sequence", "ByteLevel", "Split", "Metaspace", "Digits", "Punctuation", "Whitespace", "WhitespaceSplit"),
    *("BertPreTokenizer", "CharDelimiterSplit"),
}


@dataclass(frozen=True)
class Piece:
    """A part of a text; `first` and `last` say whether the text begins and ends with it."""

    text: str
    first: bool
    last: bool


class Cutter:
    """Cuts texts for one tokenizer; `ends` are ids that no cut may touch, those that begin and end documents."""

    def __init__(self, backend: Any, ends: Iterable[int], piece_characters: int = PIECE_CHARACTERS) -> None:
        self._backend, self._ends, self._piece_characters = backend, frozenset(ends), piece_characters
        state = json.loads(backend.to_str())
        self._model: dict[str, Any] = state["model"]
        added = max((len(token["content"]) for token in state["added_tokens"]), default=0)
        is_local = _types(state["pre_tokenizer"]) <= _LOCAL
        self._can_cut = is_local and 2 * added < min(_WINDOWS) and not self._model.get("dropout")

    def is_long(self, text: str) -> bool:
        """Whether a text is cut."""
        return len(text) > 2 * self._piece_characters

    def pieces(self, parts: Iterable[str]) -> Iterator[Piece]:
        """Cut a text that comes in parts; one for which there is no safe cut comes whole."""
        text, first, tried = "", True, 0
        for part in parts:
            text += part
            while self.is_long(text) and self._can_cut:
                cut = self._first_cut(text, max(tried, self._piece_characters), len(text) - max(_WINDOWS))
                if cut is None:
                    tried = len(text) - max(_WINDOWS)
                    break
                yield Piece(text[: cut[0]], first, last=False)
                text, first, tried = text[cut[1] :], False, 0
        yield Piece(text, first, last=True)

    def _first_cut(self, text: str, start: int, end: int) -> tuple[int, int] | None:
        """Where one piece ends and the next begins, in [start, end)."""
        for pattern in _CANDIDATES:
            for number, match in enumerate(pattern.finditer(text, start, max(start, end))):
                if number == _TRIES:
                    break
                at = match.start()
                # A normalizer that prepends a space to every text takes the place of the one at the cut.
                for then in (at, at + 1) if pattern is _SPACE else (at,):
                    if all(self._is_safe(text[max(0, at - n) : at], text[at : at + n], then - at) for n in _WINDOWS):
                        return at, then
        return None

    def _is_safe(self, left: str, right: str, dropped: int) -> bool:
        whole, rest = left + right, right[dropped:]
        words, before, after = self._words(whole), self._words(left), self._words(rest)
        if not (before and after):
            return False
        if words != before + after and not (
            len(words) == 1 and words[0] == before[0] + after[0] and self._never_joins(before[0][-1], after[0][0])
        ):
            return False
        left_ids, right_ids = self._ids(left), self._ids(rest)
        if not (left_ids and right_ids) or self._ends & {left_ids[-1], right_ids[0]}:
            return False
        return self._ids(whole) == left_ids + right_ids

    def _words(self, text: str) -> list[str]:
        normalizer, pre_tokenizer = self._backend.normalizer, self._backend.pre_tokenizer
        normal = text if normalizer is None else normalizer.normalize_str(text)
        return [normal] if pre_tokenizer is None else [word for word, _ in pre_tokenizer.pre_tokenize_str(normal)]

    def _ids(self, text: str) -> list[int]:
        return self._backend.encode(text, add_special_tokens=False).ids

    def _never_joins(self, left: str, right: str) -> bool:
        model = self._model
        affixes = model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")
        if model["type"] != "BPE" or affixes or model.get("ignore_merges"):
            return False
        return (left, right) not in self._pairs and right in model["vocab"]

    @cached_property
    def _pairs(self) -> set[tuple[str, str]]:
        """Characters side by side in any token; what merges make is a token."""
        pairs: set[tuple[str, str]] = set()
        for token in self._model["vocab"]:
            pairs.update(pairwise(token))
        return pairs


def _types(pre_tokenizer: dict[str, Any] | None) -> set[str]:
    if pre_tokenizer is None:
        return set()
    inner = pre_tokenizer.get("pretokenizers", [])
    return {pre_tokenizer["type"]}.union(*map(_types, inner))
