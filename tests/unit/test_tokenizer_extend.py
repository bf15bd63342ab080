"""Tokenizers are trained and extended; text comes back, old ids stay, and new pieces are really used."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from dist_cpt.data.tokenizer import load_tokenizer
from dist_cpt.data.tokenizer_extend import extend_tokenizer, learn_joins
from dist_cpt.data.tokenizer_train import corpus_texts, fertility, train_tokenizer
from dist_cpt.errors import ConfigError, DataError
from tests import tiny
from tests.command import command

OTHER = ["안녕하세요 세계\t여러분  안녕하세요\n", "dictionary 안녕 세계 ✓"] * 4  # characters that the corpus lacks


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return tiny.write_corpus(tmp_path_factory.mktemp("corpus"), 40)


def write(folder: Path, tokenizer: Tokenizer, **settings: str) -> Path:
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    values = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"} | settings
    (folder / "tokenizer_config.json").write_text(json.dumps(values))
    return folder


def byte_fallback(folder: Path, texts: list[str]) -> Path:
    """A BPE as Llama 2 has it: no pre-tokeniser, bytes for unknown characters, added tokens behind the model."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    strip = decoders.Strip(" ", 1, 0)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=500, special_tokens=special, show_progress=False)
    )
    tokenizer.pre_tokenizer = None
    tokenizer.add_special_tokens(["<|begin|>", "<|end|>"])
    return write(folder, tokenizer)


def unigram(folder: Path, texts: list[str]) -> Path:
    """A Unigram as SentencePiece has it: a space mark, <unk>, added tokens behind the model."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(["<|begin|>", "<|end|>"])
    return write(folder, tokenizer)


def byte_level(folder: Path, texts: list[str]) -> Path:
    """A BPE over bytes with added tokens behind the model, as Llama 3 has it."""
    tokenizer = train_tokenizer(texts, folder / "plain", 400)
    tokenizer.add_special_tokens(["<|begin|>", "<|end|>"])
    return write(folder / "base", tokenizer, eos_token="<|endoftext|>")


@pytest.mark.parametrize("make", [byte_level, byte_fallback, unigram])
def test_an_extension_keeps_old_ids_and_text_and_needs_fewer_tokens(corpus, tmp_path, make):
    texts = list(corpus_texts([str(corpus)])) + OTHER
    base = make(tmp_path / "made", texts[:40])
    out = tmp_path / "extended"
    done = extend_tokenizer(str(base), out, lambda: texts, num_new=60)
    old, new = load_tokenizer(str(base)), load_tokenizer(str(out))
    before, after = old.get_vocab(), new.get_vocab()
    assert {token: after[token] for token in before} == before
    assert [after[token] for token in done.tokens] == list(range(len(before), len(before) + len(done.tokens)))
    assert 50 <= len(done.tokens) <= 60
    assert done.used >= 0.8 * len(done.tokens)
    measured = fertility(new.backend_tokenizer, texts)
    assert measured == done.after
    assert measured.tokens < 0.95 * done.before.tokens
    assert measured.as_json()["tokens_per_word"] == round(measured.tokens / sum(len(t.split()) for t in texts), 4)
    assert measured.as_json()["bytes_per_token"] == round(sum(len(t.encode()) for t in texts) / measured.tokens, 4)
    for text in texts if make is byte_level else texts[-1:]:  # the others' own base loses blanks
        assert new.backend_tokenizer.decode(new.backend_tokenizer.encode(text).ids) == text
    assert new.encode("a<|end|>", add_special_tokens=False)[-1] == before["<|end|>"]
    if make is not byte_level:
        assert "안" in done.tokens, "characters that the base does not know come first"


def test_the_same_corpus_gives_the_same_bytes(corpus, tmp_path):
    texts = list(corpus_texts([str(corpus)]))
    base = tiny.write_tokenizer(tmp_path / "base", corpus)
    for name in ("one", "two"):
        extend_tokenizer(str(base), tmp_path / name, lambda: texts, num_new=30)
    assert (tmp_path / "one/tokenizer.json").read_bytes() == (tmp_path / "two/tokenizer.json").read_bytes()


def test_text_without_a_new_piece_keeps_its_old_tokens(corpus, tmp_path):
    base = tiny.write_tokenizer(tmp_path / "base", corpus)
    extend_tokenizer(str(base), tmp_path / "out", lambda: ["zyzzyva zyzzyva"], num_new=4)
    old, new = load_tokenizer(str(base)), load_tokenizer(str(tmp_path / "out"))
    for text in corpus_texts([str(corpus)]):
        assert new.encode(text) == old.encode(text)
    assert len(new.encode(" zyzzyva")) < len(old.encode(" zyzzyva"))


@pytest.mark.parametrize("make", [byte_level, unigram])
def test_given_words_become_one_token_after_a_space(corpus, tmp_path, make):
    base = make(tmp_path / "made", list(corpus_texts([str(corpus)])))
    words = ["iterables", "myocarditis"]
    done = extend_tokenizer(str(base), tmp_path / "out", lambda: words, words=words)
    new = load_tokenizer(str(tmp_path / "out"))
    for word in words:
        tokens = new.tokenize(f"the {word} is")
        assert any(token.endswith(word) for token in tokens), tokens
    assert len(done.tokens) == len(words) or make is byte_level  # BPE needs the steps, Unigram does not


def test_joins_by_hand():
    sequences = [(list("abab"), 3), (list("abc"), 2), (list("xy"), 9), (list("aaa"), 1)]
    joins, new = learn_joins(sequences, 4, 2, known=frozenset({"xy"}), longest=4)
    # xy is known: its row may never have been trained. aa and abc are equally frequent: the one that sorts first.
    assert joins == [("a", "b"), ("ab", "ab"), ("a", "a"), ("ab", "c")]
    assert new == {"ab": 8, "abab": 3, "aa": 2, "abc": 2}
    assert [pieces for pieces, _ in sequences] == [["abab"], ["abc"], ["x", "y"], ["aa", "a"]]


def test_what_cannot_be_extended_is_refused(corpus, tmp_path):
    base = tiny.write_tokenizer(tmp_path / "base", corpus)
    wordpiece = write(tmp_path / "wordpiece", Tokenizer(models.WordPiece({"[UNK]": 0, "</s>": 1}, unk_token="[UNK]")))
    new = tmp_path / "new"
    with pytest.raises(ConfigError, match="WordPiece"):
        extend_tokenizer(str(wordpiece), new, lambda: ["text"], num_new=1)
    with pytest.raises(ConfigError, match="two words"):
        extend_tokenizer(str(base), new, lambda: ["text"], words=["two words"])
    with pytest.raises(ConfigError, match="base"):
        extend_tokenizer(str(base), base, lambda: ["text"], num_new=1)
    with pytest.raises(DataError, match="base"):
        extend_tokenizer(str(base), new, lambda: ["a"], num_new=5)
    with pytest.raises(DataError, match="corpus"):
        extend_tokenizer(str(base), new, list, num_new=5)
    with pytest.raises(DataError, match="nowhere"):
        extend_tokenizer(str(tmp_path / "nowhere"), new, lambda: ["text"], num_new=5)
    assert not new.exists()


def test_the_commands(corpus, tmp_path):
    trained = command(
        "tokenizer", "train", corpus, "--vocab-size", 350, "--out", tmp_path / "base", "--kind", "unigram"
    )
    assert trained.code == 0, trained.err
    measured = json.loads(trained.out)
    assert (measured["vocab_size"], measured["not_restored"], measured["unknown"]) == (350, 0, 0)
    extended = command("tokenizer", "extend", tmp_path / "base", corpus, "--add", 20, "--out", tmp_path / "more")
    assert extended.code == 0, extended.err
    report = json.loads(command("tokenizer", "report", tmp_path / "more", corpus).out)
    assert report == json.loads(extended.out)["after"]
    assert report["tokens"] < measured["tokens"]
    (tmp_path / "words.txt").write_text("myocarditis\n\niterables\n")
    given = command(
        "tokenizer", "extend", tmp_path / "base", "--words", tmp_path / "words.txt", "--out", tmp_path / "w"
    )
    assert json.loads(given.out)["new_tokens"] == 2
    neither = command("tokenizer", "extend", tmp_path / "base", corpus, "--out", tmp_path / "x")
    assert (neither.code, len(neither.error_lines)) == (64, 1)
    missing = command("tokenizer", "report", tmp_path / "more", tmp_path / "nowhere.txt")
    assert (missing.code, len(missing.error_lines)) == (65, 1)
