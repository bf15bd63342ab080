"""Long texts: cut where the tokens stay those of the whole text, and read in parts from any file."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from dist_cpt.data import containers, long_text, text_formats
from dist_cpt.data.cut_text import Cutter, Piece
from dist_cpt.data.long_text import LongText
from dist_cpt.data.prepare import prepare
from dist_cpt.data.sources import RecordTally, SourceFiles, read_records, text_parser
from dist_cpt.data.tokenizer import load_tokenizer
from dist_cpt.errors import DataError
from tests.prepared_by_many import UNIT_BYTES, recipe
from tests.tiny import write_corpus, write_tokenizer

SENTENCES = [
    "The appeal isn't well-founded; the court (see above) dismissed it on 12/03/2024 for 1,250.50 EUR.",
    "Die Berufung ist zulässig, aber unbegründet.",
    "日本語の文章です。二行目、そして三行目。",
    "这是一个句子，后面还有一个。",
    "नमस्ते दुनिया यह एक वाक्य है।",
    "مرحبا بالعالم هذا نص طويل.",
    "def f(x):\n    return {'a': x ** 2}\n\n\n",
    "e\u0301a\u0308 cafe\u0301 🙂👍🏽 12345678  and   spaces\t\ttabs \n \n",
    "it's we'll THEY'RE don\u2019t x<eos>y<eos> word",
]
# The patterns of the originals: openai/gpt-2, and Llama 3's tokenizer.json.
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def document(seed: int, sentences: int) -> str:
    chance = random.Random(seed)
    return "".join(
        chance.choice(SENTENCES) + chance.choice([" ", " ", "\n", "\n\n", "  ", ""]) for _ in range(sentences)
    )


def byte_level(pre_tokenizer: Any, normalizer: Any = None, **model: Any) -> Tokenizer:
    backend = Tokenizer(models.BPE(**model))
    backend.pre_tokenizer, backend.decoder = pre_tokenizer, decoders.ByteLevel()
    if normalizer is not None:
        backend.normalizer = normalizer
    return trained(backend, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())


def sentencepiece(normalizer: Any, pre_tokenizer: Any = None) -> Tokenizer:
    """Characters with a fallback to bytes, and ▁ for a space."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizer
    words = pre_tokenizers.Metaspace(prepend_scheme="never")  # tokens never span words, as in the originals
    backend.pre_tokenizer = words
    trained(backend)
    state = json.loads(backend.to_str())
    state["pre_tokenizer"] = None if pre_tokenizer is None else json.loads(pre_tokenizer.__getstate__())
    return Tokenizer.from_str(json.dumps(state))


def trained(backend: Tokenizer, **options: Any) -> Tokenizer:
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=["<eos>", "<unk>"], show_progress=False, **options)
    backend.train_from_iterator([document(seed, 40) for seed in range(20)], trainer)
    return backend


def with_added(backend: Tokenizer) -> Tokenizer:
    backend.add_tokens([AddedToken("court", lstrip=True), AddedToken("Berufung", single_word=True, rstrip=True)])
    return backend


GPT_2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
GEMMA = normalizers.Replace(" ", "▁")
TOKENIZERS = {
    "gpt-2": lambda: byte_level(GPT_2),
    "gpt-2 with added words": lambda: with_added(byte_level(GPT_2)),
    "llama-3": lambda: byte_level(
        pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(LLAMA_3), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        ),
        ignore_merges=True,
    ),
    "nfc": lambda: byte_level(GPT_2, normalizers.NFC()),
    "gemma": lambda: sentencepiece(GEMMA, pre_tokenizers.Split(" ", "merged_with_previous")),
    "llama-2": lambda: sentencepiece(normalizers.Sequence([normalizers.Prepend("▁"), GEMMA])),
    "metaspace": lambda: sentencepiece(normalizers.NFKC(), pre_tokenizers.Metaspace()),
}


def pieces(backend: Tokenizer, text: str, size: int, part: int = 1000) -> list[Piece]:
    cutter = Cutter(backend, [0], size)
    return list(cutter.pieces(text[start : start + part] for start in range(0, len(text), part)))


def ids(backend: Tokenizer, text: str) -> list[int]:
    return backend.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokens_of_the_pieces_are_those_of_the_text(name: str) -> None:
    backend = TOKENIZERS[name]()
    num_pieces = 0
    for seed in range(100, 112):
        text = document(seed, 120)
        cut = pieces(backend, text, 300)
        num_pieces += len(cut)
        assert [token for piece in cut for token in ids(backend, piece.text)] == ids(backend, text)
        assert [piece.first for piece in cut] == [True] + [False] * (len(cut) - 1)
        assert [piece.last for piece in cut] == [False] * (len(cut) - 1) + [True]
    assert num_pieces > 12 * 5


def test_a_cut_after_a_line_break_would_change_the_tokens() -> None:
    backend = byte_level(GPT_2)
    text = "word\n\nword " * 3
    at = text.index("\n\n") + 2
    assert ids(backend, text) != ids(backend, text[:at]) + ids(backend, text[at:])


@pytest.mark.parametrize("why", ["no border", "counts", "words join", "dropout"])
def test_a_text_without_a_safe_cut_comes_whole(why: str) -> None:
    backend, text = byte_level(GPT_2), document(0, 200)
    if why == "no border":
        text = "x" * 5000
    elif why == "counts":
        backend.pre_tokenizer = pre_tokenizers.FixedLength(5)
    elif why == "words join":  # tokens with a space inside
        backend = Tokenizer(models.BPE(unk_token="<unk>"))
        backend.normalizer = GEMMA
        trained(backend)
    else:
        backend.model.dropout = 0.1
    (whole,) = pieces(backend, text, 300)
    assert whole == Piece(text, first=True, last=True)


# Long texts in files.


@pytest.fixture
def short_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines and strings are long from a few characters on, and reads are small."""
    for module in (containers, text_formats):
        monkeypatch.setattr(module, "READ_BYTES", 16)
    monkeypatch.setattr(text_formats, "LONG_BYTES", 16)
    monkeypatch.setattr(long_text, "_LONG_STRING_BYTES", 16)
    monkeypatch.setattr(long_text, "_READ_BYTES", 7)


def texts_of(path: Path, spool: Path | None, policy: Any = "skip", **settings: Any) -> tuple[list[str], dict[str, int]]:
    tally = RecordTally(policy)
    files = SourceFiles([path], **settings)
    records = list(read_records("s", files, text_parser("meta.text"), tally, spool=spool))
    values = [record.value for record in records]
    return ["".join(v.parts()) if isinstance(v, LongText) else v for v in values], tally.counts.bad


@pytest.mark.usefixtures("short_limits")
@pytest.mark.parametrize("ascii_only", [True, False])
def test_long_lines_hold_the_same_texts(tmp_path: Path, ascii_only: bool) -> None:
    texts = [document(seed, 6) + '\\ "quoted" \u2028 \U0001d11e' for seed in range(30)]
    records: list[Any] = [{"id": number, "meta": {"text": text, "n": [text, 1]}} for number, text in enumerate(texts)]
    lines = [json.dumps(record, ensure_ascii=ascii_only).encode() for record in records]
    good = b"\n".join(lines)
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + good)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(good + b"\n"))
    for name in ("a.jsonl", "a.jsonl.gz"):
        assert texts_of(tmp_path / name, tmp_path) == texts_of(tmp_path / name, None) == (texts, {})
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.txt").write_bytes(text.encode())
        assert texts_of(tmp_path / f"{number}.txt", tmp_path) == ([text], {})


@pytest.mark.usefixtures("short_limits")
@pytest.mark.parametrize(
    "line",
    [
        b'{"meta": {"text": "no end, no end, no end',
        b'{"meta": {"text": "an escape that is none: \\x, \\u12 and more"}}',
        b'{"meta": {"text": "half a pair: \\ud83d and more, much more"}}',
        b'{"meta": {"text": "a NUL: \\u0000 and more, much more"}}',
        b'{"meta": {"text": "a control character: \t and more, much more"}}',
        b'{"meta": {"text": "not UTF-8: \xff\xfe and more, much more"}}',
        b'["a long element of no object", 1]',
        b'{"meta": {"other": "a long value of another field"}}',
        b'{"meta": {"text": ["a long value in a list"]}}',
    ],
)
def test_long_lines_are_bad_for_the_reasons_of_short_ones(tmp_path: Path, line: bytes) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"meta": {"text": "first"}}\n' + line + b'\n{"meta": {"text": "last"}}\n')
    assert texts_of(tmp_path / "a.jsonl", tmp_path) == texts_of(tmp_path / "a.jsonl", None)
    assert texts_of(tmp_path / "a.jsonl", tmp_path)[0] == ["first", "last"]


@pytest.mark.usefixtures("short_limits")
@pytest.mark.parametrize("size", [10, 40])
def test_a_record_above_the_limit_is_bad_in_every_file(tmp_path: Path, size: int) -> None:
    rows = [{"meta": {"text": text}} for text in ("a", "b" * 100, "c")]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "a.json").write_text(json.dumps([rows[1]]))
    (tmp_path / "a.txt").write_text("b" * 100)
    limit = 30 + size
    for spool in (None, tmp_path):
        assert texts_of(tmp_path / "a.jsonl", spool, max_record_bytes=limit) == (["a", "c"], {"too_large": 1})
        assert texts_of(tmp_path / "a.txt", spool, max_record_bytes=limit) == ([], {"too_large": 1})
    with pytest.raises(DataError, match=rf"jsonl:2: \d+ bytes, more than data.max_record_bytes {limit}"):
        texts_of(tmp_path / "a.jsonl", tmp_path, "error", max_record_bytes=limit)


@pytest.mark.usefixtures("short_limits")
def test_a_store_is_the_same_however_its_texts_are_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With BOS at the beginning, and an EOS spelled out in the middle, of documents in many pieces."""
    write_tokenizer(tmp_path / "tokenizer", write_corpus(tmp_path / "corpus"))
    eos = load_tokenizer(str(tmp_path / "tokenizer")).eos_token
    texts = [document(seed, 40 * (seed % 3)).replace("<eos>", str(eos)) or "a" for seed in range(12)]
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    stores = {}
    for size in (1 << 18, 300):
        monkeypatch.setattr(Cutter.__init__, "__defaults__", (size,))
        config = recipe(tmp_path, tmp_path / str(size), sources=[{"path": str(tmp_path / "lines.jsonl")}])
        store = prepare(config, unit_bytes=UNIT_BYTES).sources[0].store
        stores[size] = (store.manifest.content_hash, store.manifest.counts)
    assert stores[300] == stores[1 << 18]
