"""Documents that an earlier document repeats, across the sources of a recipe: exactly, or nearly by MinHash.

Which of them is kept follows from the order of the sources in the recipe and of the documents in each: the first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np

from dist_cpt.data.store import TokenStore
from dist_cpt.errors import MissingExtraError
from dist_cpt.runtime.liveness import made_progress

MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # odd, so that it has an inverse modulo 2**64
_CHUNK = 1 << 20  # tokens
# Source: Penedo et al. 2024, The FineWeb Datasets (arXiv 2406.17557): 5-grams, 14 bands of 8 hashes, which find
# documents that are 75 % alike in 77 % of the cases and 50 % alike in 5 %.
SHINGLE = 5
BANDS, ROWS = 14, 8


def exact_duplicates(stores: Sequence[TokenStore]) -> list[np.ndarray]:
    """Of each store the documents, ascending int64, with the tokens and labels of an earlier one; 16 bytes of memory
    per document."""
    hashes = np.concatenate([document_hashes(store) for store in stores])
    first_of_store = np.cumsum([0, *(store.num_documents for store in stores)])
    order = np.argsort(hashes, kind="stable")  # equal ones in reading order
    repeats = np.flatnonzero(hashes[order[1:]] == hashes[order[:-1]]) + 1
    is_duplicate = np.zeros(len(hashes), dtype=bool)
    first, previous = -1, -1
    for at in repeats.tolist():
        if at != previous + 1:  # a new group: what precedes it is the one that stays
            first = int(order[at - 1])
        previous = at
        document = int(order[at])
        # A hash of 64 bits says that they may be equal, the tokens that they are.
        is_duplicate[document] = _same(*_located(stores, first_of_store, first, document))
        made_progress()
    return [np.flatnonzero(part) for part in np.split(is_duplicate, first_of_store[1:-1])]


def document_hashes(store: TokenStore) -> np.ndarray:
    """A hash of the tokens and labels of each document, uint64 [num_documents]: sum of (token + 1) * m^i over its
    tokens i, modulo 2**64."""
    hashes = np.zeros(store.num_documents, dtype=np.uint64)
    powers = _powers(_CHUNK)
    for start in range(0, store.num_tokens, _CHUNK):
        values = store.tokens[start : start + _CHUNK].astype(np.uint64) + np.uint64(1)
        if store.answers is not None:
            values = values * np.uint64(2) + store.answers[start : start + _CHUNK]
        first, starts = store.documents_between(start, start + len(values))
        borders = np.maximum(starts[:-1] - start, 0)
        sums = np.add.reduceat(values * powers[: len(values)], borders)
        # The power of a token is its place in the chunk; it becomes that in the document.
        earlier = np.maximum(start - starts[:-1], 0)
        hashes[first : first + len(sums)] += sums * _power(_INVERSE, borders) * _power(MULTIPLIER, earlier)
        made_progress()
    if store.classes is not None:
        hashes += (store.classes.astype(np.uint64) + np.uint64(1)) * _power(MULTIPLIER, store.lengths)
    return hashes


_INVERSE = np.uint64(pow(int(MULTIPLIER), -1, 2**64))


def _powers(count: int) -> np.ndarray:
    factors = np.full(count, MULTIPLIER)
    factors[0] = 1
    return np.cumprod(factors)


def _power(number: np.uint64, exponents: np.ndarray) -> np.ndarray:
    """`number` to each power, modulo 2**64, uint64 of the shape of `exponents` (>= 0)."""
    result = np.ones(len(exponents), dtype=np.uint64)
    factor = int(number)
    for bit in range(int(exponents.max(initial=0)).bit_length()):
        result[(exponents >> bit) & 1 == 1] *= np.uint64(factor)
        factor = factor * factor % 2**64
    return result


Place = tuple[TokenStore, int]


def _located(stores: Sequence[TokenStore], first_of_store: np.ndarray, *documents: int) -> Iterator[Place]:
    for document in documents:
        store = int(np.searchsorted(first_of_store, document, side="right")) - 1
        yield stores[store], document - int(first_of_store[store])


def _same(one: Place, other: Place) -> bool:
    return all(np.array_equal(*pair) for pair in zip(_content(*one), _content(*other), strict=True))


def _content(store: TokenStore, document: int) -> list[np.ndarray]:
    start, length = store.start_of(document), int(store.lengths[document])
    content = [store.tokens[start : start + length]]
    if store.answers is not None:
        content.append(store.answers[start : start + length])
    if store.classes is not None:
        content.append(store.classes[document : document + 1])
    return content


def near_duplicates(stores: Sequence[TokenStore]) -> list[np.ndarray]:
    """Of each store the documents, ascending int64, that MinHash takes for an earlier one that stays; about 3 KB of
    memory per document that stays.

    Raises:
        MissingExtraError: datasketch is not installed.
    """
    try:
        from datasketch import MinHash, MinHashLSH
    except ImportError:
        raise MissingExtraError("data.deduplicate: near", "dedup") from None
    index: Any = MinHashLSH(num_perm=BANDS * ROWS, params=(BANDS, ROWS))
    empty: Any = MinHash(num_perm=BANDS * ROWS, seed=1, hashfunc=int, scheme="affine64")
    found = []
    for number, store in enumerate(stores):
        duplicates = []
        for document in range(store.num_documents):
            signature = empty.copy()
            signature.update_batch(_shingles(store.document(document)))
            if index.query(signature):
                duplicates.append(document)
            else:
                index.insert((number, document), signature)
            made_progress()
        found.append(np.array(duplicates, dtype=np.int64))
    return found


def _shingles(ids: np.ndarray) -> list[int]:
    """The hashes of all `SHINGLE` tokens in a row, or of a shorter document."""
    return np.unique(ngram_hashes(ids, min(SHINGLE, len(ids)))).tolist()


def ngram_hashes(ids: np.ndarray, n: int) -> np.ndarray:
    """A hash of every n tokens in a row, uint64 [len(ids) - n + 1], of ids [T]."""
    count = max(len(ids) - n + 1, 0)
    tokens = ids.astype(np.uint64) + np.uint64(1)
    hashes = tokens[:count].copy()
    for offset in range(1, n):
        hashes *= MULTIPLIER
        hashes += tokens[offset : offset + count]
    return hashes


Deduplicate = Literal["none", "exact", "near"]


def find_duplicates(stores: Sequence[TokenStore], how: Deduplicate) -> list[np.ndarray]:
    """Of each store the documents, ascending int64, that repeat an earlier one of any store.

    Raises:
        MissingExtraError: as `near_duplicates`.
    """
    if how == "none":
        return [np.zeros(0, dtype=np.int64) for _ in stores]
    return exact_duplicates(stores) if how == "exact" else near_duplicates(stores)
