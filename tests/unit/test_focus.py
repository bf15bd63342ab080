"""Mixtures of old rows for new tokens: the weights, that they repeat, and which files are refused."""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from tokenizers import Tokenizer, models, pre_tokenizers

from dist_cpt.data.focus import FILE, VECTORS, Focus, read_focus, sparsemax, write_focus
from dist_cpt.data.tokenizer import load_new_vocabulary, load_tokenizer
from dist_cpt.data.tokenizer_train import fertility, train_tokenizer
from dist_cpt.errors import DataError, MissingExtraError
from tests.command import command
from tests.tiny import recipe, write_corpus, write_tokenizer
from tests.whole_run import built

HASHES = ("a" * 64, "b" * 64)


def word(number: int) -> str:
    """Letters that say nothing, so that likeness can only come from use."""
    return hashlib.sha256(str(number).encode()).hexdigest()[:10]


# Each of 66 old words stands among 8 out of a common 88, and two of them share at most one: lines in a plane over 11.
# "violin" is new and stands where "harp" does; "quartz" is new and rare.
LINES = [(start, slope) for start in range(11) for slope in range(6)]
AROUND = {
    word(number) if number else "harp": [word(1000 + 11 * x + (start + slope * x) % 11) for x in range(8)]
    for number, (start, slope) in enumerate(LINES)
}
COMMON = [word(1000 + number) for number in range(88)]
OLD = [*AROUND, *COMMON, "<eos>"]
NEW = ["violin", "quartz"]
EMBEDDINGS = {"train": ["embed_tokens", "lm_head"], "init": "focus"}


def tokenizer() -> Tokenizer:
    made = Tokenizer(models.WordLevel({word: index for index, word in enumerate(OLD + NEW)}, unk_token="<eos>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(["<eos>"])
    return made


def texts() -> list[str]:
    chance = random.Random(0)
    around = AROUND | {"violin": AROUND["harp"]}
    found = []
    for _ in range(40_000):
        one = chance.choice(list(around))
        words = chance.sample(around[one], 6)
        found.append(" ".join([*words[:3], one, *words[3:]]))
    found[0] += " <eos>" * 20
    return [*found, "quartz"]


def write(folder: Path) -> Focus:
    usage = np.zeros(len(OLD + NEW), dtype=np.int64)
    fertility(tokenizer(), texts(), usage)
    return write_focus(folder, tokenizer(), usage, len(OLD), texts, HASHES)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("focus")
    return folder, write(folder)


def by_bisection(scores: np.ndarray) -> np.ndarray:
    low, high = scores.min() - 1, scores.max()
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if np.maximum(scores - middle, 0).sum() > 1 else (low, middle)
    return np.maximum(scores - high, 0)


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
@pytest.mark.parametrize("spread", [1e-3, 0.3, 30.0])
def test_sparsemax_is_the_nearest_point_of_the_simplex(size, spread):
    scores = np.random.default_rng(size).normal(size=size) * spread
    weights = sparsemax(scores)
    assert abs(weights.sum() - 1) < 1e-9
    assert np.abs(weights - by_bisection(scores)).max() < 1e-9


def test_sparsemax_by_hand():
    assert sparsemax(np.array([0.9, 0.9, 0.2, -1.0])).tolist() == pytest.approx([0.5, 0.5, 0, 0])
    assert sparsemax(np.array([2.0, 0.9])).tolist() == pytest.approx([1, 0])


def test_a_new_token_is_made_of_those_that_are_used_alike(written):
    folder, done = written
    assert (done.mixed, done.too_rare, done.old_tokens) == (1, 1, len(OLD) - 1)
    mixtures, _ = read_focus(str(folder), len(OLD), len(OLD + NEW), HASHES)
    assert list(mixtures) == [len(OLD)], "quartz is too rare"
    ids, weights = mixtures[len(OLD)]
    shares = {OLD[index]: float(weight) for index, weight in zip(ids, weights, strict=True)}
    assert abs(sum(shares.values()) - 1) < 1e-6
    print(shares)
    assert max(shares, key=lambda word: shares[word]) == "harp"
    assert shares["harp"] > 0.5, shares


@pytest.mark.matrix
def test_two_processes_write_the_same_bytes(written, tmp_path):
    code = f"from pathlib import Path; from tests.unit.test_focus import write; write(Path({str(tmp_path)!r}))"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONHASHSEED": "4711"})
    assert (tmp_path / FILE).read_bytes() == (written[0] / FILE).read_bytes()


def test_files_that_do_not_fit_are_refused(written, tmp_path):
    where, first, size = str(written[0]), len(OLD), len(OLD + NEW)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / FILE).write_bytes(b"no safetensors")
    cases = [
        (where, first, size, ("c" * 64, HASHES[1]), r"model\.path.*aaaaaaaaaaaa.*cccccccccccc"),
        (where, first, size, (HASHES[0], "c" * 64), "bbbbbbbbbbbb.*cccccccccccc"),
        (where, first + 1, size, HASHES, FILE),
        (where, first, first, HASHES, FILE),
        (str(tmp_path), first, size, HASHES, FILE),
        (str(tmp_path / "broken"), first, size, HASHES, "cannot be read"),
    ]
    for *arguments, problem in cases:
        with pytest.raises(DataError, match=problem) as caught:
            read_focus(*arguments)
        assert "\n" not in str(caught.value)
        assert "dist-cpt tokenizer extend --focus" in str(caught.value)


def test_what_the_corpus_must_show(tmp_path):
    usage = np.full(len(OLD + NEW), 100, dtype=np.int64)
    usage[len(OLD) :] = 9
    with pytest.raises(DataError, match="154 old and 0 new tokens"):
        write_focus(tmp_path, tokenizer(), usage, len(OLD), texts, HASHES)
    assert not list(tmp_path.iterdir())


def test_without_gensim_the_extra_is_named(monkeypatch, tmp_path):
    for name in [name for name in sys.modules if name.split(".")[0] == "gensim"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "gensim", None)
    usage = np.full(len(OLD + NEW), 100, dtype=np.int64)
    with pytest.raises(MissingExtraError, match=r"--focus needs the extra 'focus'.*dist-cpt\[focus\]"):
        write_focus(tmp_path, tokenizer(), usage, len(OLD), texts, HASHES)


def test_the_file_is_plain_arrays(written):
    arrays = load_file(written[0] / FILE)
    assert {key: str(values.dtype) for key, values in arrays.items()} == {
        "rows": "int64",
        "counts": "int64",
        "ids": "int64",
        "weights": "float32",
    }


def test_the_command_writes_what_a_run_reads(monkeypatch, tmp_path):
    monkeypatch.setitem(VECTORS, "vector_size", 40)  # learns from less
    base, out, corpus, given = (tmp_path / name for name in ("base", "out", "corpus.jsonl", "words.txt"))
    lines = texts()[:12_000]
    train_tokenizer([line for line in lines[:4000] if "violin" not in line], base, 1800)
    corpus.write_text("".join(json.dumps({"text": f" {line}"}) + "\n" for line in lines))
    given.write_text("violin\n")
    ended = command("tokenizer", "extend", base, corpus, "--words", given, "--focus", "--out", out)
    assert ended.code == 0, ended.err
    done = json.loads(ended.out)
    assert done["focus"]["mixed"] == done["used"] == 1
    assert done["focus"]["too_rare"] == done["new_tokens"] - 1, "the steps on the way to it"

    config = built(recipe(base, corpus, tmp_path, embeddings=EMBEDDINGS | {"new_tokens": str(out)}))
    new = load_new_vocabulary(config)
    assert new is not None
    assert new.mixtures_sha256 == hashlib.sha256((out / FILE).read_bytes()).hexdigest()
    extended = load_tokenizer(str(out))
    ((row, (ids, weights)),) = new.mixtures.items()
    assert extended.convert_ids_to_tokens(row) == "Ġviolin"
    assert extended.convert_ids_to_tokens(int(ids[weights.argmax()])) == "Ġharp"

    # A base that reads text in another way, though every id is the same.
    content = json.loads((base / "tokenizer.json").read_text())
    content["normalizer"] = {"type": "NFC"}
    (base / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"model\.path"):
        load_new_vocabulary(config)


def test_the_command_refuses_too_little(tmp_path):
    corpus = write_corpus(tmp_path / "corpus", 20)
    base = write_tokenizer(tmp_path / "base", corpus)
    small = command("tokenizer", "extend", base, corpus, "--add", 20, "--focus", "--out", tmp_path / "out")
    assert (small.code, len(small.error_lines)) == (65, 1)
    assert "use more text" in small.error_lines[0]
    (tmp_path / "words.txt").write_text("myocarditis\n")
    words = tmp_path / "words.txt"
    none = command("tokenizer", "extend", base, "--words", words, "--focus", "--out", tmp_path / "out")
    assert (none.code, len(none.error_lines)) == (64, 1)
    assert "--focus needs a corpus" in none.error_lines[0]
    assert not (tmp_path / "out").exists()
