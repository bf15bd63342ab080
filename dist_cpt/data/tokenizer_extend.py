"""Extend a tokenizer with pieces learnt from a corpus, or with given words.

New pieces go into the tokenizer's model, not into its list of added tokens: added tokens are cut out of the text before
pre-tokenisation, inside words too, which changes how the rest is tokenised. Text without a new piece keeps its tokens.

BPE: training continues where it ended. The corpus is tokenised with the base's merges; the most frequent pairs are
joined, and each join becomes a merge after all old ones. Unigram: the pieces learnt this way get the log of their share
of the corpus as score. Characters that the base does not know are added first.
Source: Sennrich et al. 2016 (arXiv 1508.07909), algorithm 1, for the joins.
"""

from __future__ import annotations

import heapq
import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dist_cpt.data.focus import Focus, require_gensim, write_focus
from dist_cpt.data.token_ids import batch_ids, unpadded_copy
from dist_cpt.data.tokenizer import load_tokenizer, tokenizer_hash, vocabulary_size
from dist_cpt.data.tokenizer_train import Fertility, fertility
from dist_cpt.errors import ConfigError, DataError
from dist_cpt.run_folder.staging import new_output, require_new
from dist_cpt.storage import read_bytes

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MAX_PIECE_CHARACTERS = 32  # of a learnt piece, in the model's alphabet
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")  # byte fallback of SentencePiece models
_WORD = re.compile(r"▁[^▁]*|[^▁]+")  # for models without pre-tokeniser; ▁ is their space
_STALE = ("vocab.json", "merges.txt", "tokenizer.model", "spiece.model", "added_tokens.json")
_CHECKED_DOCUMENTS = 200

Join = tuple[str, str]
Texts = Callable[[], Iterable[str]]  # every call iterates the corpus from its start


@dataclass(frozen=True)
class Extended:
    """The result of an extension: the new tokens in the order of their ids, and the corpus before and after."""

    tokens: list[str]
    used: int  # of the new tokens in the corpus; the others are steps towards a longer one
    rare_characters: int  # unknown to the base, but too rare in the corpus to be added
    before: Fertility
    after: Fertility
    focus: Focus | None = None

    def as_json(self) -> dict[str, Any]:
        """The counts, without the tokens."""
        counts = {"new_tokens": len(self.tokens), "used": self.used, "rare_characters": self.rare_characters}
        mixed = {} if self.focus is None else {"focus": self.focus.__dict__}
        return counts | {"before": self.before.as_json(), "after": self.after.as_json()} | mixed


def extend_tokenizer(
    base_path: str,
    out: Path,
    texts: Texts,
    *,
    num_new: int | None = None,
    words: Sequence[str] = (),
    min_frequency: int = 2,
    focus: bool = False,
) -> Extended:
    """Write the tokenizer at `base_path` with at most `num_new` pieces learnt from `texts` to the new folder `out`.

    With `words`, each word becomes one token as it occurs after a space, and `texts` are only measured. Old tokens
    keep their ids. The same base and corpus give the same bytes. `focus` also writes the mixtures for
    `embeddings.init: focus`.

    Raises:
        ConfigError: the base is neither BPE nor Unigram, it splits one of `words`, or `out` is not empty.
        DataError: the base or the corpus is missing, there is nothing to add, or texts are restored worse.
        MissingExtraError: `focus` without gensim.
        WriteError: `out` cannot be written.
    """
    require_new(out)
    if focus:
        require_gensim()
    base = load_tokenizer(base_path)
    backend = unpadded_copy(base.backend_tokenizer)
    content = _require_extendable(json.loads(backend.to_str()), base_path)
    counts = Counter(_as_one_word(backend, word) for word in words) if words else _count_words(backend, texts())
    if words:
        min_frequency, num_new = 1, None
    first_id = vocabulary_size(base)
    total = sum(count * len(backend.model.tokenize(word)) for word, count in counts.items())
    characters, rare = _unknown_characters(content, counts, min_frequency, num_new)
    with_characters = _from_json(_with_pieces(content, first_id, _scores(backend, characters, total), []))
    sequences = _tokenise_words(with_characters, counts)
    joins, pieces = learn_joins(
        sequences,
        math.inf if num_new is None else num_new - len(characters),
        min_frequency,
        known=frozenset(with_characters.get_vocab()),
        longest=math.inf if words else MAX_PIECE_CHARACTERS,
    )
    if content["model"]["type"] == "Unigram":  # needs no intermediate pieces
        final = {piece for sequence, _ in sequences for piece in sequence}
        pieces = {piece: count for piece, count in pieces.items() if piece in final}
    new = characters | pieces
    if not new:
        raise DataError(f"the corpus gives {base_path} nothing to add", remedy="use more text or a lower minimum")
    extended = _from_json(_with_pieces(content, first_id, _scores(backend, new, total), joins))
    _require_one_token(extended, counts if words else {})
    before, after, usage = _compare(backend, extended, texts)
    mixed = _write(base, extended, texts, out, usage if focus else None)
    return Extended(list(new), int(np.count_nonzero(usage[first_id:])), rare, before, after, mixed)


def read_words(path: Path) -> list[str]:
    """The distinct lines of a text file, stripped.

    Raises:
        DataError: it cannot be read, or has no word.
    """
    try:
        lines = read_bytes(path).decode().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--words: {path} cannot be read: {error}") from error
    words = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if not words:
        raise DataError(f"--words: {path} has no word", remedy="write one word per line")
    return words


def learn_joins(
    sequences: list[tuple[list[str], int]], num_new: float, min_frequency: int, *, known: frozenset[str], longest: float
) -> tuple[list[Join], dict[str, int]]:
    """Join the most frequent pairs in `sequences`, in place, until there are `num_new` new pieces.

    `sequences` are (pieces, frequency). A join that yields a `known` piece is skipped: its row may never have been
    trained. Ties go to the pair that sorts first. Returns the joins in order, and each new piece with its frequency
    when it was joined.
    """
    counts: Counter[Join] = Counter()
    where: defaultdict[Join, set[int]] = defaultdict(set)
    for index, (pieces, frequency) in enumerate(sequences):
        for pair in pairwise(pieces):
            counts[pair] += frequency
            where[pair].add(index)
    heap = [(-count, pair) for pair, count in counts.items()]
    heapq.heapify(heap)
    joins: list[Join] = []
    new: dict[str, int] = {}
    while heap and len(new) < num_new:
        negative, pair = heapq.heappop(heap)
        piece = "".join(pair)
        if counts[pair] != -negative:
            continue  # a stale entry: pushed again with its new count
        if -negative < min_frequency:
            break
        if piece in known or len(piece) > longest:
            continue
        joins.append(pair)
        new.setdefault(piece, -negative)
        changed: set[Join] = set()
        for index in where.pop(pair):
            pieces, frequency = sequences[index]
            for neighbours in pairwise(pieces):
                counts[neighbours] -= frequency
                changed.add(neighbours)
            pieces[:] = _join(pieces, pair)
            for neighbours in pairwise(pieces):
                counts[neighbours] += frequency
                where[neighbours].add(index)
                changed.add(neighbours)
        for other in changed:
            if counts[other] > 0:
                heapq.heappush(heap, (-counts[other], other))
    return joins, new


def _join(pieces: list[str], pair: Join) -> list[str]:
    result: list[str] = []
    for piece in pieces:
        # In aaa the first two are joined, as in the encoder.
        if result and piece == pair[1] and result[-1] == pair[0]:
            result[-1] = pair[0] + pair[1]
        else:
            result.append(piece)
    return result


def _from_json(content: dict[str, Any]) -> Tokenizer:
    from tokenizers import Tokenizer

    return Tokenizer.from_str(json.dumps(content))


def _require_extendable(content: dict[str, Any], base_path: str) -> dict[str, Any]:
    model = content["model"]
    kind = model["type"]
    if kind not in ("BPE", "Unigram"):
        raise ConfigError(f"tokenizer: {base_path} is a {kind}; only BPE and Unigram can be extended")
    for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(key):
            raise ConfigError(f"tokenizer: {base_path} has {key} {model[key]!r}, which cannot be extended")
    return content


def _words(backend: Any, text: str) -> list[str]:
    """The normalised, pre-tokenised words of a text, in the model's alphabet."""
    if backend.normalizer is not None:
        text = backend.normalizer.normalize_str(text)
    if backend.pre_tokenizer is None:
        return _WORD.findall(text)
    return [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text)]


def _count_words(backend: Any, texts: Iterable[str]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(_words(backend, text))
    if not counts:
        raise DataError("the corpus has no document", remedy="check the paths and --text")
    return counts


def _as_one_word(backend: Any, word: str) -> str:
    """`word` in the model's alphabet, as it occurs after a space.

    Raises:
        ConfigError: the pre-tokeniser splits it, and no piece can cross that border.
    """
    alone, after = _words(backend, "a"), _words(backend, f"a {word}")
    if after[: len(alone)] != alone or len(after) != len(alone) + 1:
        parts = " ".join(repr(part) for part in after[len(alone) :])
        raise ConfigError(f"--words: the base splits {word!r} into {parts} before tokenising; give single words")
    return after[-1]


def _unknown_characters(
    content: dict[str, Any], counts: Counter[str], min_frequency: int, num_new: int | None
) -> tuple[dict[str, int], int]:
    """Frequencies of the characters to add, the most frequent first, and the number of unknown ones left out.

    They get at most half of the new pieces. A byte-level model knows all its characters.
    """
    model = content["model"]
    vocab = model["vocab"] if model["type"] == "BPE" else {piece for piece, _ in model["vocab"]}
    unknown: Counter[str] = Counter()
    for word, count in counts.items():
        for character in word:
            if character not in vocab:
                unknown[character] += count
    ranked = sorted(((c, n) for c, n in unknown.items() if n >= min_frequency), key=lambda item: (-item[1], item[0]))
    added = dict(ranked if num_new is None else ranked[: num_new // 2])
    return added, len(unknown) - len(added)


def _tokenise_words(tokenizer: Any, counts: Counter[str]) -> list[tuple[list[str], int]]:
    """Runs of pieces with their frequency: every word, split where it falls back to bytes or the unknown token."""
    unknown = json.loads(tokenizer.to_str())["model"].get("unk_token")
    sequences: list[tuple[list[str], int]] = []
    for word, count in sorted(counts.items()):
        run: list[str] = []
        for token in tokenizer.model.tokenize(word):
            if token.value == unknown or _BYTE.fullmatch(token.value):
                sequences.append((run, count))
                run = []
            else:
                run.append(token.value)
        sequences.append((run, count))
    return [(run, count) for run, count in sequences if run]


def _scores(backend: Any, frequencies: dict[str, int], total: int) -> dict[str, float]:
    """For a Unigram, each piece's log share, but above the score of the old pieces it replaces; 0 for a BPE."""
    model = json.loads(backend.to_str())["model"]
    if model["type"] != "Unigram":
        return dict.fromkeys(frequencies, 0.0)
    old = dict(map(tuple, model["vocab"]))
    lowest = min(old.values())
    scores = {}
    for piece, count in frequencies.items():
        path = sum(old.get(token.value, lowest) for token in backend.model.tokenize(piece))
        scores[piece] = max(math.log(count / total), path + 0.01)
    return scores


def _with_pieces(
    content: dict[str, Any], first_id: int, pieces: dict[str, float], joins: Sequence[Join]
) -> dict[str, Any]:
    """The content of tokenizer.json with `pieces` (and their scores) from id `first_id`.

    Added tokens are entered into the model too: tokenizers assigns one that the model lacks the next free id, which
    would differ from its old one.
    """
    model = dict(content["model"])
    added = {token["id"]: token["content"] for token in content["added_tokens"]}
    new = {piece: first_id + index for index, piece in enumerate(pieces)}
    if model["type"] == "BPE":
        model["vocab"] = model["vocab"] | {token: index for index, token in added.items()} | new
        model["merges"] = [*model["merges"], *map(list, joins)]
    else:
        vocab = list(model["vocab"])
        lowest = min(score for _, score in vocab)
        for index in range(len(vocab), first_id):
            vocab.append([added.get(index, f"<unused {index}>"), lowest - 100])  # matched before the model runs
        model["vocab"] = [*vocab, *([piece, score] for piece, score in pieces.items())]
    return content | {"model": model}


def _require_one_token(extended: Any, words: Iterable[str]) -> None:
    for word in words:
        pieces = [token.value for token in extended.model.tokenize(word)]
        if len(pieces) != 1:
            raise DataError(
                f"--words: {word!r} still becomes {' '.join(pieces)}: the base has that piece, or a part of it, unused",
                remedy="leave the word out",
            )


def _compare(base: Any, extended: Any, texts: Texts) -> tuple[Fertility, Fertility, np.ndarray]:
    usage = np.zeros(max(extended.get_vocab().values()) + 1, dtype=np.int64)
    before, after = fertility(base, texts()), fertility(extended, texts(), usage)
    if after.not_restored > before.not_restored or after.unknown > before.unknown:
        raise DataError(
            f"the extended tokenizer does not restore {after.not_restored} of {after.documents} documents (the base: "
            f"{before.not_restored}); unknown tokens {after.unknown} (the base: {before.unknown})",
            remedy="nothing was written; report this with the base's name",
        )
    return before, after, usage


def _write(base: Any, extended: Tokenizer, texts: Texts, out: Path, usage: np.ndarray | None) -> Focus | None:
    """Write the base's folder with the new tokenizer.json, check it by loading it; with `usage`, write mixtures too."""
    with new_output(out) as folder:
        folder.mkdir()
        base.save_pretrained(folder)
        for name in _STALE:
            (folder / name).unlink(missing_ok=True)
        extended.save(str(folder / "tokenizer.json"))
        loaded = load_tokenizer(str(folder))
        old, new = (t.backend_tokenizer.get_vocab(with_added_tokens=True) for t in (base, loaded))
        moved = [token for token, index in old.items() if new.get(token) != index]
        sample = list(islice(texts(), _CHECKED_DOCUMENTS))
        if moved or batch_ids(unpadded_copy(loaded.backend_tokenizer), sample) != batch_ids(extended, sample):
            what = f"{moved[0]!r} has another id" if moved else "texts get other tokens"
            raise DataError(f"{out}: loaded by transformers ({type(base).__name__}), {what}; nothing was written")
        if usage is None:
            return None
        sha256s = tokenizer_hash(base), tokenizer_hash(loaded)
        return write_focus(folder, extended, usage, vocabulary_size(base), texts, sha256s)
