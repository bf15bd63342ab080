"""The documents of a shard as windows: enough consecutive documents that packing them on their own wastes little.

A window ends where a piece of a document ends, as `packing` cuts it: its blocks have the same pieces as if the shard
were packed as a whole, and a document of any length passes through bounded memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from dist_cpt.data.encode import Encoded
from dist_cpt.data.packing import PackingPlan, pack
from dist_cpt.data.store import LABEL_FILES, LabelKind, largest_id, token_dtype

WINDOW_TOKENS = 1 << 22
WINDOW_BLOCKS = 32  # at least, of long sequences


def window_tokens(seq_len: int) -> int:
    """Tokens after which a window ends at the next piece's end."""
    return max(WINDOW_TOKENS, WINDOW_BLOCKS * seq_len)


@dataclass(frozen=True)
class Window:
    """Documents in memory, as a store has them on disk, and their blocks."""

    tokens: np.ndarray
    lengths: np.ndarray  # int64 [num_documents]; the last may have one token more than its blocks, as a target
    starts: np.ndarray  # int64 [num_documents]
    answers: np.ndarray | None  # by token
    classes: np.ndarray | None  # by document
    plan: PackingPlan

    def start_of(self, document: int) -> int:
        """Offset of a document's first token."""
        return int(self.starts[document])


def windows_of(
    encoded: Iterable[Encoded], seq_len: int, num_tokens: int, vocab_size: int, label_kind: LabelKind | None
) -> Iterator[Window]:
    """Windows of `num_tokens` and up to `seq_len` more, in the order of the documents.

    Raises:
        DataError: an id outside the vocabulary.
    """
    waiting = _Documents(vocab_size, label_kind)
    for documents in encoded:
        waiting.append(documents)
        # With one token more than the longest window, what follows its end is known.
        while waiting.num_tokens > num_tokens + seq_len:
            yield waiting.take(num_tokens, seq_len)
    while waiting.num_tokens:
        yield waiting.take(num_tokens, seq_len)


class _Documents:
    """Documents in a row, of which the last may grow."""

    def __init__(self, vocab_size: int, label_kind: LabelKind | None) -> None:
        self.num_tokens = 0
        self._vocab_size, self._kind = vocab_size, label_kind
        self._ids = [np.zeros(0, token_dtype(vocab_size))]
        self._lengths = [np.zeros(0, np.int64)]
        self._labels = [] if label_kind is None else [np.zeros(0, LABEL_FILES[label_kind][1])]

    def append(self, encoded: Encoded) -> None:
        if not len(encoded.ids):
            return
        largest_id(encoded.ids, self._vocab_size)
        self._ids.append(encoded.ids.astype(self._ids[0].dtype))
        lengths = encoded.lengths.astype(np.int64)
        if encoded.continues:  # in place: the last array is never empty then
            self._lengths[-1][-1] += lengths[0]
            lengths = lengths[1:]
        if len(lengths):
            self._lengths.append(lengths)
        if encoded.labels is not None:
            self._labels.append(encoded.labels.astype(self._labels[0].dtype))
        self.num_tokens += len(encoded.ids)

    def take(self, num_tokens: int, seq_len: int) -> Window:
        """Remove the documents up to the first end of a piece at or after `num_tokens`."""
        ids, lengths = np.concatenate(self._ids), np.concatenate(self._lengths)
        labels = np.concatenate(self._labels) if self._labels else None
        ends = np.cumsum(lengths)
        last, cut = len(ends) - 1, int(ends[-1])
        if cut > num_tokens + seq_len:
            last = int(np.searchsorted(ends, num_tokens))
            start = int(ends[last] - lengths[last])
            cut = min(start - (start - num_tokens) // seq_len * seq_len, int(ends[last]))
        more = cut < ends[last]  # the document continues: its next token is a target here
        planned = np.append(lengths[:last], cut - (ends[last] - lengths[last]))
        taken = np.append(planned[:-1], planned[-1] + more)
        by_token = self._kind == "answers"
        window = Window(
            ids[: cut + more],
            taken,
            np.cumsum(planned) - planned,
            labels[: cut + more] if labels is not None and by_token else None,
            labels[: last + 1] if labels is not None and not by_token else None,
            pack(planned, seq_len),
        )
        left = np.append(ends[last] - cut, lengths[last + 1 :])[0 if more else 1 :]
        self._ids, self._lengths = [ids[cut:].copy()], [left]
        if labels is not None:
            self._labels = [labels[cut:] if by_token else labels[last + 1 :]]
        self.num_tokens -= cut
        return window
