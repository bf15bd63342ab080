"""Training text that is in a held-out set: n-grams of tokens, hashed once per set and looked up in every source.

Of conversations only the answers are compared: their template gives all of them the same words in between.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from dist_cpt.data.duplicates import ngram_hashes
from dist_cpt.data.store import TokenStore
from dist_cpt.runtime.liveness import made_progress

NGRAM = 13  # tokens. Source: Brown et al. 2020, Language Models are Few-Shot Learners (arXiv 2005.14165), appendix C
# Tokens in a row that two documents share only if one has text of the other.
# Source: Lee et al. 2022, Deduplicating Training Data Makes Language Models Better (arXiv 2107.06499), section 4.2
PASSAGE = 50
_CHUNK = 1 << 20  # tokens; 32 MB of memory per thread
_MAX_THREADS = 8  # numpy releases the interpreter lock


@dataclass(frozen=True)
class Overlap:
    """What one source has of the held-out sets."""

    documents: np.ndarray  # int64, ascending: those with a passage of a held-out document
    shared: np.ndarray  # int64 [num_sets]: n-grams of each set that the source has


class HeldOutNGrams:
    """The n-grams of all held-out sets, without EOS and BOS; 50 to 90 bytes of memory for each."""

    def __init__(self, stores: Sequence[TokenStore]) -> None:
        per_set = [_ngrams(store) for store in stores]
        hashes, passages = (np.concatenate(part) for part in zip(*per_set, strict=True))
        order = np.argsort(hashes)
        hashes = hashes[order]
        is_first = np.diff(hashes, prepend=hashes[:1] - np.uint64(1)) != 0
        self._hashes = hashes[is_first]  # uint64 [G], ascending
        first = np.flatnonzero(is_first)
        # Of the shortest document that has it.
        self._passage = np.minimum.reduceat(passages[order], first) if len(first) else passages
        of_set = np.repeat(np.arange(len(stores)), [len(part) for part, _ in per_set])[order]
        ngram = np.cumsum(is_first) - 1
        self._sets = np.zeros((len(stores), len(self._hashes)), dtype=bool)
        self._sets[of_set, ngram] = True
        self.counts = self._sets.sum(axis=1)  # int64 [num_sets]
        bits = max(16, int(16 * len(self._hashes)).bit_length())
        self._shift, self._mask = np.uint64(64 - bits), np.uint64((1 << bits) - 1)
        # Most n-grams of a source are in neither table: by the first bits of a hash, and by its last.
        self._first_bits, self._last_bits = (np.zeros(1 << bits, dtype=bool) for _ in range(2))
        self._first_bits[self._hashes >> self._shift] = True
        self._last_bits[self._hashes & self._mask] = True

    def overlap(self, store: TokenStore) -> Overlap:
        """Look for them in a source, reading each token once."""
        seen = np.zeros(len(self._hashes), dtype=bool)
        documents: list[np.ndarray] = []
        if not len(seen):  # held-out documents of fewer tokens
            return Overlap(np.zeros(0, dtype=np.int64), self.counts)
        with ThreadPoolExecutor(_MAX_THREADS) as pool:
            for found, ngrams in pool.map(lambda start: self._in_chunk(store, start), _starts(store)):
                seen[ngrams] = True
                documents.append(found)
                made_progress()
        return Overlap(
            np.unique(np.concatenate([np.zeros(0, dtype=np.int64), *documents])),
            (self._sets & seen).sum(axis=1),
        )

    def _in_chunk(self, store: TokenStore, start: int) -> tuple[np.ndarray, np.ndarray]:
        """Documents with a passage that begins among the `_CHUNK` tokens from `start`, and the n-grams seen."""
        tokens = store.tokens[start : start + _CHUNK + PASSAGE + NGRAM]
        hashes = ngram_hashes(tokens, NGRAM)
        at = np.flatnonzero(self._first_bits[hashes >> self._shift])
        at = at[self._last_bits[hashes[at] & self._mask]]
        ngram = np.minimum(np.searchsorted(self._hashes, hashes[at]), len(self._hashes) - 1)
        found = self._hashes[ngram] == hashes[at]
        at, ngram = at[found], ngram[found]
        position = at + start
        document, begin, end = _bodies(store, position, start + len(tokens))
        inside = (position >= begin) & (position + NGRAM <= end)  # an n-gram of one document
        position, document, ngram = position[inside], document[inside], ngram[inside]
        if not len(position):
            return document, ngram
        is_first = np.diff(position, prepend=-2) != 1
        is_first[1:] |= document[1:] != document[:-1]
        runs = np.flatnonzero(is_first)
        length = np.diff(np.append(runs, len(position))) + NGRAM - 1
        passage = np.minimum.reduceat(self._passage[ngram], runs)
        passage = np.minimum(passage, (end - begin)[inside][runs])  # or all of a shorter document
        return document[runs[length >= passage]], ngram


def _starts(store: TokenStore) -> Iterator[int]:
    return iter(range(0, store.num_tokens, _CHUNK))


def _ngrams(store: TokenStore) -> tuple[np.ndarray, np.ndarray]:
    """The hash of each n-gram, uint64, and the tokens of a passage of its document, int64."""
    hashes, passages = [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)]
    for start in _starts(store):
        found = ngram_hashes(store.tokens[start : start + _CHUNK + NGRAM - 1], NGRAM)
        position = np.arange(start, start + len(found))
        _, begin, end = _bodies(store, position, start + len(found))
        inside = (position >= begin) & (position + NGRAM <= end)
        hashes.append(found[inside])
        passages.append(np.minimum((end - begin)[inside], PASSAGE))
        made_progress()
    return np.concatenate(hashes), np.concatenate(passages)


def _bodies(store: TokenStore, position: np.ndarray, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The document at each ascending position below `stop`, and where its text, or the answer at that position,
    begins and ends, without BOS and EOS; int64 each."""
    if not len(position):
        return position, position, position
    first, starts = store.documents_between(int(position[0]), stop)
    document = np.searchsorted(starts, position, side="right") - 1
    has_bos = store.manifest.source.get("bos") is not None
    begin, end = starts[document] + int(has_bos), starts[document + 1] - 1
    if store.answers is not None:
        answer_begin, answer_end = _answers(store.answers, position, stop)
        begin, end = np.maximum(begin, answer_begin), np.minimum(end, answer_end)
    return first + document, begin, end


def _answers(is_answer_T: np.ndarray, position: np.ndarray, stop: int) -> tuple[np.ndarray, np.ndarray]:
    """Where the answer at each position begins and ends, but no further than a passage outside of them; of a position
    in no answer the begin is behind it. int64 each."""
    low, high = max(0, int(position[0]) - PASSAGE), min(len(is_answer_T), stop + PASSAGE)
    is_answer, index = is_answer_T[low:high].astype(bool), np.arange(low, high)
    begin = np.maximum.accumulate(np.where(is_answer, low, index + 1))
    end = np.minimum.accumulate(np.where(is_answer, high, index)[::-1])[::-1]
    return begin[position - low], end[position - low]
