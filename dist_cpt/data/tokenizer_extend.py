"""A tokenizer with more pieces: learnt from a corpus or given as words, on top of what it has.

New pieces go into the tokenizer's own model, not into its list of added tokens. Added tokens are cut out of the text
before the pre-tokeniser sees it, inside words too, which changes how the rest is read; pieces of the model are found
where the model looks, and old text keeps its old pieces but where a new one joins them.

BPE: training goes on where it ended. The corpus is cut with the base's merges; the most frequent neighbours are
joined, again and again, and each join becomes a merge behind all old ones. Unigram: the pieces found in this way get
the logarithm of their share of the corpus as score. Characters that the base does not know come first.
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
from dist_cpt.data.tokenizer import load_tokenizer, tokenizer_hash, vocabulary_size
from dist_cpt.data.tokenizer_train import Fertility, fertility, new_folder, require_new
from dist_cpt.errors import ConfigError, DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MAX_PIECE_CHARACTERS = 32  # of a piece learnt from a corpus, in the model's alphabet
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")  # a byte of a character that a SentencePiece model does not know
_PIECE = re.compile(r"▁[^▁]*|[^▁]+")  # words for a model without pre-tokeniser; ▁ is its space
_STALE = ("vocab.json", "merges.txt", "tokenizer.model", "spiece.model", "added_tokens.json")
_CHECKED_DOCUMENTS = 200

Join = tuple[str, str]
Texts = Callable[[], Iterable[str]]  # the corpus, from its beginning


@dataclass(frozen=True)
class Extended:
    """What an extension did: the new tokens in the order of their ids, and the corpus before and after."""

    tokens: list[str]
    used: int  # of them in the corpus; the others are steps on the way to a longer one
    rare_characters: int  # that the base does not know and the corpus has too seldom
    before: Fertility
    after: Fertility
    focus: Focus | None = None  # where it was asked for

    def as_json(self) -> dict[str, Any]:
        """Counts instead of the tokens."""
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

    With `words` each of them becomes one token, as it stands after a space, and `texts` only measures. Ids and
    meaning of the old tokens stay. The same base and corpus give the same bytes. `focus` adds what
    `embeddings.init: focus` reads.

    Raises:
        ConfigError: the base is neither BPE nor Unigram, a word is not one word to it, or `out` is in use.
        DataError: no base there, no corpus, nothing to add, or a text that would not come back as it was.
        MissingExtraError: `focus` without gensim.
        WriteError: `out` cannot be written.
    """
    require_new(out)
    if focus:
        require_gensim()
    base = load_tokenizer(base_path)
    backend = _plain(base.backend_tokenizer)
    content = _require_extendable(json.loads(backend.to_str()), base_path)
    counts = Counter(_as_one_word(backend, word) for word in words) if words else _count_words(backend, texts())
    if words:
        min_frequency, num_new = 1, None
    first_id = vocabulary_size(base)
    total = sum(count * len(backend.model.tokenize(word)) for word, count in counts.items())
    characters, rare = _unknown_characters(content, counts, min_frequency, num_new)
    with_characters = _built(_with_pieces(content, first_id, _scored(backend, characters, total), []))
    sequences = _cut(with_characters, counts)
    joins, pieces = learn_joins(
        sequences,
        math.inf if num_new is None else num_new - len(characters),
        min_frequency,
        known=frozenset(with_characters.get_vocab()),
        longest=math.inf if words else MAX_PIECE_CHARACTERS,
    )
    if content["model"]["type"] == "Unigram":  # there a piece needs no steps that lead to it
        final = {piece for sequence, _ in sequences for piece in sequence}
        pieces = {piece: count for piece, count in pieces.items() if piece in final}
    found = characters | pieces
    if not found:
        raise DataError(f"the corpus gives {base_path} nothing to add", remedy="use more text or a lower minimum")
    extended = _built(_with_pieces(content, first_id, _scored(backend, found, total), joins))
    _require_one_token(extended, counts if words else {})
    before, after, usage = _compare(backend, extended, texts)
    mixed = _write(base, extended, texts, out, usage if focus else None)
    return Extended(list(found), int(np.count_nonzero(usage[first_id:])), rare, before, after, mixed)


def read_words(path: Path) -> list[str]:
    """The lines of a text file without blanks around them, each once.

    Raises:
        DataError: it cannot be read, or holds no word.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--words: {path} cannot be read: {error}") from error
    words = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if not words:
        raise DataError(f"--words: {path} holds no word", remedy="one word a line")
    return words


def learn_joins(
    sequences: list[tuple[list[str], int]], num_new: float, min_frequency: int, *, known: frozenset[str], longest: float
) -> tuple[list[Join], dict[str, int]]:
    """Join the most frequent neighbours in `sequences`, in place, until `num_new` pieces are new.

    `sequences` are (pieces, how often); a join that would give a `known` piece is left out: its row may never have
    been trained. Ties go to the pair that sorts first. Returns the joins in order, and each new piece with the
    frequency it was made at.
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
            continue  # pushed again when it changed
        if -negative < min_frequency:
            break
        if piece in known or len(piece) > longest:
            continue
        joins.append(pair)
        new.setdefault(piece, -negative)
        changed: set[Join] = set()
        for index in where.pop(pair):
            pieces, frequency = sequences[index]
            for old in pairwise(pieces):
                counts[old] -= frequency
                changed.add(old)
            pieces[:] = _joined(pieces, pair)
            for fresh in pairwise(pieces):
                counts[fresh] += frequency
                where[fresh].add(index)
                changed.add(fresh)
        for other in changed:
            if counts[other] > 0:
                heapq.heappush(heap, (-counts[other], other))
    return joins, new


def _joined(pieces: list[str], pair: Join) -> list[str]:
    result: list[str] = []
    for piece in pieces:
        # The left one is looked up unjoined: in aaa the first two join, as the encoder does it.
        if result and piece == pair[1] and result[-1] == pair[0]:
            result[-1] = pair[0] + pair[1]
        else:
            result.append(piece)
    return result


def _built(content: dict[str, Any]) -> Tokenizer:
    from tokenizers import Tokenizer

    return Tokenizer.from_str(json.dumps(content))


def _plain(backend: Tokenizer) -> Any:
    """A copy that neither pads nor truncates."""
    from tokenizers import Tokenizer

    copy = Tokenizer.from_str(backend.to_str())
    copy.no_padding()
    copy.no_truncation()
    return copy


def _require_extendable(content: dict[str, Any], base_path: str) -> dict[str, Any]:
    model = content["model"]
    kind = model["type"]
    if kind not in ("BPE", "Unigram"):
        raise ConfigError(f"tokenizer: {base_path} is a {kind}; BPE and Unigram can be extended")
    for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(key):
            raise ConfigError(f"tokenizer: {base_path} has {key} {model[key]!r}, with which extending is not supported")
    return content


def _words(backend: Any, text: str) -> list[str]:
    """What the model is given of a text: the normalised words, in its own alphabet."""
    if backend.normalizer is not None:
        text = backend.normalizer.normalize_str(text)
    if backend.pre_tokenizer is None:
        return _PIECE.findall(text)
    return [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text)]


def _count_words(backend: Any, texts: Iterable[str]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(_words(backend, text))
    if not counts:
        raise DataError("the corpus holds no document", remedy="check the paths and --text")
    return counts


def _as_one_word(backend: Any, word: str) -> str:
    """`word` as the model is given it after a space.

    Raises:
        ConfigError: the base reads it as several words, and no piece can cross their border.
    """
    alone, after = _words(backend, "a"), _words(backend, f"a {word}")
    if after[: len(alone)] != alone or len(after) != len(alone) + 1:
        parts = " ".join(repr(part) for part in after[len(alone) :])
        raise ConfigError(f"--words: the base cuts {word!r} into {parts} before it looks for pieces; give single words")
    return after[-1]


def _unknown_characters(
    content: dict[str, Any], counts: Counter[str], min_frequency: int, num_new: int | None
) -> tuple[dict[str, int], int]:
    """Characters of the corpus that the model has no piece for, the most frequent first, and how many are left out.

    They may take half of what is to be added. A byte-level model knows all its characters.
    """
    model = content["model"]
    vocab = model["vocab"] if model["type"] == "BPE" else {piece for piece, _ in model["vocab"]}
    seen: Counter[str] = Counter()
    for word, count in counts.items():
        for character in word:
            if character not in vocab:
                seen[character] += count
    ranked = sorted(((c, n) for c, n in seen.items() if n >= min_frequency), key=lambda item: (-item[1], item[0]))
    chosen = dict(ranked if num_new is None else ranked[: num_new // 2])
    return chosen, len(seen) - len(chosen)


def _cut(tokenizer: Any, counts: Counter[str]) -> list[tuple[list[str], int]]:
    """Every word as the tokenizer's pieces; where it knows only bytes, or nothing, no join can cross."""
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


def _scored(backend: Any, found: dict[str, int], total: int) -> dict[str, float]:
    """A score for each piece, for a Unigram: its log share, but above that of the old pieces it stands for."""
    model = json.loads(backend.to_str())["model"]
    if model["type"] != "Unigram":
        return dict.fromkeys(found, 0.0)
    old = dict(map(tuple, model["vocab"]))
    lowest = min(old.values())
    scores = {}
    for piece, count in found.items():
        path = sum(old.get(token.value, lowest) for token in backend.model.tokenize(piece))
        scores[piece] = max(math.log(count / total), path + 0.01)
    return scores


def _with_pieces(
    content: dict[str, Any], first_id: int, pieces: dict[str, float], joins: Sequence[Join]
) -> dict[str, Any]:
    """tokenizer.json with `pieces` from id `first_id`.

    The added tokens become entries of the model too: a reader gives an added token that the model does not hold the
    next free id, which would no longer be its old one.
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
            vocab.append([added.get(index, f"<unused {index}>"), lowest - 100])  # found before the model is asked
        model["vocab"] = [*vocab, *([piece, score] for piece, score in pieces.items())]
    return content | {"model": model}


def _require_one_token(extended: Any, words: Iterable[str]) -> None:
    for word in words:
        pieces = [token.value for token in extended.model.tokenize(word)]
        if len(pieces) != 1:
            raise DataError(
                f"--words: {word!r} stays {' '.join(pieces)}: the base holds that piece, or a part of it, unused",
                remedy="leave the word out",
            )


def _compare(base: Any, extended: Any, texts: Texts) -> tuple[Fertility, Fertility, np.ndarray]:
    usage = np.zeros(max(extended.get_vocab().values()) + 1, dtype=np.int64)
    before, after = fertility(base, texts()), fertility(extended, texts(), usage)
    if after.not_restored > before.not_restored or after.unknown > before.unknown:
        raise DataError(
            f"the extended tokenizer does not give back {after.not_restored} of {after.documents} documents, the base "
            f"{before.not_restored}; unknown tokens {after.unknown}, the base {before.unknown}",
            remedy="nothing was written; report this with the base's name",
        )
    return before, after, usage


def _write(base: Any, extended: Tokenizer, texts: Texts, out: Path, usage: np.ndarray | None) -> Focus | None:
    """The base's folder with the new tokenizer.json, read back before it gets its name; mixtures where `usage` is."""
    with new_folder(out) as folder:
        base.save_pretrained(folder)
        for name in _STALE:
            (folder / name).unlink(missing_ok=True)
        extended.save(str(folder / "tokenizer.json"))
        loaded = load_tokenizer(str(folder))
        again = loaded.backend_tokenizer
        old, new = (backend.get_vocab(with_added_tokens=True) for backend in (base.backend_tokenizer, again))
        moved = [token for token, index in old.items() if new.get(token) != index]
        sample = list(islice(texts(), _CHECKED_DOCUMENTS))
        ids, expected = (
            [e.ids for e in t.encode_batch_fast(sample, add_special_tokens=False)] for t in (_plain(again), extended)
        )
        if moved or ids != expected:
            what = f"{moved[0]!r} has another id" if moved else "texts have other tokens"
            raise DataError(
                f"{out}: read back through transformers, {what} ({type(base).__name__}); nothing was written"
            )
        if usage is None:
            return None
        sha256s = tokenizer_hash(base), tokenizer_hash(loaded)
        return write_focus(folder, extended, usage, vocabulary_size(base), texts, sha256s)
