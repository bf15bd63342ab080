"""FOCUS: initial embedding rows of new tokens as mixtures of the rows of old tokens that are used alike.

Static vectors of all tokens are trained on the corpus, tokenised by the extended tokenizer. The weights of a new token
are the sparsemax of its cosine similarities to the old tokens; a run initialises its row with that mixture.
Source: Dobler & de Melo 2023 (arXiv 2305.14481), section 2; Bojanowski et al. 2017 (arXiv 1607.04606), the vectors.

The only file that imports gensim. The mixtures are flat arrays in `focus.safetensors` beside the tokenizer.
A: old tokens with a vector, D: vector size, V: vocabulary.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dist_cpt.data.token_ids import batch_ids
from dist_cpt.data.tokenizer_train import in_batches, unknown_token_id
from dist_cpt.errors import DataError, MissingExtraError
from dist_cpt.storage import read_bytes

if TYPE_CHECKING:
    from tokenizers import Tokenizer

FILE = "focus.safetensors"
VECTORS = {"vector_size": 300, "epochs": 3, "min_count": 10, "negative": 10, "window": 5, "min_n": 3, "max_n": 6}
_SENTENCE_TOKENS = 1000  # gensim drops what exceeds 10,000
_ROWS_AT_ONCE = 256
_REMEDY = "make it again: dist-cpt tokenizer extend --focus"

Mixture = tuple[np.ndarray, np.ndarray]  # ids int64 [n] of old tokens, their weights fp32 [n], which sum to 1


@dataclass(frozen=True)
class Focus:
    """Counts of new tokens; the `too_rare` ones are initialised to the mean of their pieces."""

    mixed: int
    too_rare: int  # less than min_count times in the corpus
    old_tokens: int  # with a vector
    per_token: float  # old tokens in a mixture, on average


def require_gensim() -> Any:
    """gensim's FastText.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        from gensim.models import FastText
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "gensim":
            raise
        raise MissingExtraError("--focus", "focus") from None
    return FastText


def write_focus(
    folder: Path,
    tokenizer: Tokenizer,
    usage_V: np.ndarray,
    first_row: int,
    texts: Callable[[], Iterable[str]],
    sha256s: tuple[str, str],
) -> Focus:
    """Train vectors on `texts` and write the mixtures of the tokens from id `first_row` into `folder`.

    `usage_V` int64 counts each token of the extended `tokenizer` in `texts`; `sha256s` are the hashes of the old and
    the extended tokenizer. One thread, one seed: the same corpus on the same machine gives the same bytes.

    Raises:
        DataError: no new or no old token is frequent enough, or the vectors are too similar to be of use.
        MissingExtraError: gensim is not installed.
    """
    ids_A, vectors_AD, new_ids, new_vectors = _vectors(tokenizer, usage_V, first_row, texts)
    mixtures = list(_mixtures(ids_A, vectors_AD, new_vectors))
    counts = np.array([len(ids) for ids, _ in mixtures], dtype=np.int64)
    if counts.mean() > len(ids_A) / 2:  # all cosines are about equal: every row would be the mean of all
        raise DataError(
            f"--focus: a mixture has {counts.mean():.0f} of {len(ids_A)} old tokens on average: the vectors are too "
            "similar",
            remedy="use more text, or leave --focus out",
        )
    from safetensors.numpy import save_file

    arrays = {
        "rows": new_ids,
        "counts": counts,
        "ids": np.concatenate([ids for ids, _ in mixtures]),
        "weights": np.concatenate([weights for _, weights in mixtures]),
    }
    metadata = {"old_sha256": sha256s[0], "new_sha256": sha256s[1], "first_row": first_row, "vectors": VECTORS}
    # One entry: the order of several in the file is not deterministic.
    save_file(arrays, folder / FILE, metadata={"focus": json.dumps(metadata, sort_keys=True)})
    too_rare = len(usage_V) - first_row - len(new_ids)
    return Focus(len(new_ids), too_rare, len(ids_A), round(float(counts.mean()), 1))


def read_focus(where: str, first_row: int, size: int, sha256s: tuple[str, str]) -> tuple[dict[int, Mixture], str]:
    """The mixtures by new token id from the folder or hub id `where`, and the sha256 of the file.

    New token ids are in [first_row, size); `sha256s` are the hashes of the base and the extended tokenizer.

    Raises:
        DataError: the file is missing, damaged, or made for other tokenizers.
    """
    path = _focus_file(where)
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            metadata = json.loads((file.metadata() or {})["focus"])
            rows, counts, ids, weights = (file.get_tensor(key) for key in ("rows", "counts", "ids", "weights"))
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise DataError(f"embeddings.init: focus: {path} cannot be read: {error}", remedy=_REMEDY) from error
    for key, who, expected in zip(("old_sha256", "new_sha256"), ("model.path", where), sha256s, strict=True):
        if metadata.get(key) != expected:
            raise DataError(
                f"embeddings.init: focus: {path} was made with another tokenizer than that of {who}: sha256 "
                f"{str(metadata.get(key))[:12]} in the file, {expected[:12]} here",
                remedy=_REMEDY,
            )
    ends = np.cumsum(counts)
    fits = len(rows) == len(counts) and len(ids) == len(weights) == (ends[-1] if len(ends) else 0)
    if not (fits and _within(rows, first_row, size) and _within(ids, 0, first_row) and (counts > 0).all()):
        raise DataError(f"embeddings.init: focus: {path} has token ids out of range", remedy=_REMEDY)
    spans = zip(rows, ends - counts, ends, strict=True)
    mixtures = {int(row): (ids[start:end], weights[start:end]) for row, start, end in spans}
    return mixtures, hashlib.sha256(read_bytes(Path(path))).hexdigest()


def sparsemax(scores: np.ndarray) -> np.ndarray:
    """The point of the probability simplex nearest to `scores` fp64 [N]; most entries are 0.

    Source: Martins & Astudillo 2016 (arXiv 1602.02068), algorithm 1.
    """
    highest = np.sort(scores[scores > scores.max() - 1])[::-1]  # no other can be above the threshold
    excess = np.cumsum(highest) - 1
    support = np.count_nonzero(highest * np.arange(1, len(highest) + 1) > excess)
    return np.maximum(scores - excess[support - 1] / support, 0)


def _vectors(
    tokenizer: Any, usage_V: np.ndarray, first_row: int, texts: Callable[[], Iterable[str]]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Ids and unit vectors fp64 of the old tokens, and of the new ones, that are frequent enough in the corpus."""
    fast_text = require_gensim()
    names = {index: token for token, index in tokenizer.get_vocab(with_added_tokens=True).items()}
    ids = np.flatnonzero(usage_V >= VECTORS["min_count"])
    # Special tokens and <unk> are not text: their similarities mean nothing.
    no_text = {index for index, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    no_text.add(unknown_token_id(tokenizer))
    old = np.array([i for i in ids if i < first_row and i not in no_text], dtype=np.int64)
    new = ids[ids >= first_row]
    if not len(old) or not len(new):
        raise DataError(
            f"--focus: {len(old)} old and {len(new)} new tokens occur {VECTORS['min_count']} times or more",
            remedy="use more text, or leave --focus out",
        )
    model = fast_text(**VECTORS, bucket=4 * len(names), seed=1, workers=1, hashfxn=_hash)
    model.build_vocab_from_freq({names[i]: int(usage_V[i]) for i in ids})
    model.train(_Sentences(tokenizer, names, texts), total_words=int(usage_V.sum()), epochs=VECTORS["epochs"])
    vectors = (np.array([model.wv[names[i]] for i in part], dtype=np.float64) for part in (old, new))
    old_vectors, new_vectors = (v / np.maximum(np.linalg.norm(v, axis=1, keepdims=True), 1e-12) for v in vectors)
    return old, old_vectors, new, new_vectors


def _mixtures(ids_A: np.ndarray, vectors_AD: np.ndarray, new_vectors: np.ndarray) -> Iterator[Mixture]:
    for start in range(0, len(new_vectors), _ROWS_AT_ONCE):
        for cosines_A in new_vectors[start : start + _ROWS_AT_ONCE] @ vectors_AD.T:
            weights_A = sparsemax(cosines_A)
            kept = weights_A > 1e-6  # below is rounding error, which would make the file irreproducible
            yield ids_A[kept], (weights_A[kept] / weights_A[kept].sum()).astype(np.float32)


class _Sentences:
    """The corpus as lists of tokens, iterated once per epoch."""

    def __init__(self, tokenizer: Any, names: dict[int, str], texts: Callable[[], Iterable[str]]) -> None:
        self._tokenizer, self._names, self._texts = tokenizer, names, texts

    def __iter__(self) -> Iterator[list[str]]:
        for batch in in_batches(self._texts()):
            for ids in batch_ids(self._tokenizer, batch):
                tokens = [self._names[index] for index in ids]  # encoding.tokens would have the text of unknown ones
                for start in range(0, len(tokens), _SENTENCE_TOKENS):
                    yield tokens[start : start + _SENTENCE_TOKENS]


def _hash(text: str) -> int:
    return zlib.crc32(text.encode())  # hash() differs between processes


def _within(values: np.ndarray, low: int, high: int) -> bool:
    return bool(((values >= low) & (values < high)).all())


def _focus_file(where: str) -> Path:
    if Path(where).is_dir():
        path = Path(where) / FILE
        if path.is_file():
            return path
        raise DataError(f"embeddings.init: focus: {where} has no {FILE}", remedy=_REMEDY)
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(where, FILE))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise DataError(f"embeddings.init: focus: {where}: {FILE} cannot be downloaded", remedy=_REMEDY) from error
