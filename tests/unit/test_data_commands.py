"""`dist-cpt data`: what a store tells about itself, a full check, several stores as one, and the text it came from."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from dist_cpt.config.resolve import resolve_paths
from dist_cpt.config.schema import RunConfig
from dist_cpt.data.prepare import prepare
from dist_cpt.data.store import HEADER, StoreWriter, TokenStore
from tests.command import command

TEXTS = [
    "吾輩は猫である。名前はまだ無い。",
    "我是一只猫，还没有名字。",
    "Straße, Äpfel & Größe — naïve café",
    "مرحبا بالعالم، كَيْفَ حالُكَ؟",
    "नमस्ते दुनिया, क्षत्रिय ज्ञान",
    "👩‍👩‍👧‍👦 and 🏳️‍🌈, 🇯🇵 too",
    "e\u0301 is not é, a\u0328\u0301 has two marks",
    "  two  spaces, a tab\t, lines\n\n\r\nand  ",
    "def f(x):\n    return x\n",
    "<script>alert(1)</script>",
]
BPE = {"special_tokens": ["<eos>", "<s>"], "show_progress": False}


def byte_level() -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(TEXTS[:4], trainers.BpeTrainer(vocab_size=350, initial_alphabet=alphabet, **BPE))
    return backend


def llama_2_like() -> Tokenizer:
    """As SentencePiece's BPE with byte fallback, converted: spaces are a letter, and one is put before a text."""
    pieces = ["<unk>", "<eos>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "n", "e", "▁a", "▁an"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    merges = [("▁", "a"), ("▁a", "n")]
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    fused = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(fused)
    backend.add_special_tokens(["<unk>", "<eos>", "<s>"])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    return backend


def gemma_like() -> Tokenizer:
    """Spaces are a letter, and nothing is put before a text."""
    backend = llama_2_like()
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return backend


def saved(backend: Tokenizer, folder: Path) -> Path:
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", bos_token="<s>").save_pretrained(folder)
    return folder


def made(folder: Path, tokenizer: Path, texts: list[str] | None = None, **changes: Any) -> Path:
    """The store of some texts."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [json.dumps({"text": text}) for text in TEXTS if texts is None] + [
        json.dumps({"text": t}) for t in texts or []
    ]
    (folder / "corpus.jsonl").write_text("\n".join(rows))
    source: dict[str, Any] = {"path": str(folder / "corpus.jsonl")}
    data = {"seq_len": 32, "tokenizer": str(tokenizer), "cache_dir": str(folder / "cache"), "sources": [source]}
    values: dict[str, Any] = {"name": "t", "output_dir": str(folder), "adapter": {"kind": "none"}}
    values |= {"model": {"config": {"model_type": "llama"}}, "batch": {"global_tokens": 32}, "train": {"tokens": 32}}
    config = resolve_paths(RunConfig.model_validate(values | {"data": data | changes}))
    return prepare(config).sources[0].store.folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(byte_level(), tmp_path_factory.mktemp("tokenizer") / "bpe")


@pytest.fixture(scope="module")
def store(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("store"), tokenizer)


def texts_of(lines: str) -> list[str]:
    return [json.loads(line)["text"] for line in lines.removesuffix("\n").split("\n")]


@pytest.mark.parametrize("kind", [byte_level, llama_2_like, gemma_like])
@pytest.mark.parametrize("bos", ["auto", "always", "never"])
def test_text_comes_back_byte_for_byte(tmp_path: Path, kind: Any, bos: str) -> None:
    folder = made(tmp_path, saved(kind(), tmp_path / "tokenizer"), bos=bos)
    begins_with_bos = bos == "always" or (bos == "auto" and kind is not byte_level)
    assert (TokenStore.open(folder).document(0)[0] == 2 - (kind is byte_level)) == begins_with_bos
    ended = command("data", "decode", folder)
    assert ended.code == 0, ended.err
    assert texts_of(ended.out) == TEXTS


def test_a_file_of_some_documents_that_datasets_opens(store: Path, tmp_path: Path) -> None:
    import datasets

    out = tmp_path / "out.jsonl"
    assert command("data", "decode", store, "--out", out).code == 0
    rows = datasets.Dataset.from_json(str(out), cache_dir=str(tmp_path / "cache"))
    assert rows["text"][:] == TEXTS
    again = command("data", "decode", store, "--out", out)
    assert (again.code, "exists" in again.err) == (64, True)
    assert texts_of(command("data", "decode", store, "--documents", "-2:").out) == TEXTS[-2:]
    assert texts_of(command("data", "decode", store, "--documents", "3:5").out) == TEXTS[3:5]
    assert command("data", "decode", store, "--documents", "3").code == 64
    assert list(tmp_path.glob("*.tmp*")) == []


def test_labels_come_back_with_the_text(tokenizer: Path, tmp_path: Path) -> None:
    backend = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    talks = [
        [("user: 文?", 0), ("字 é", 1), ("user: and?", 0), ("no<eos>", 1)],
        [("only asked<eos>", 0)],
        [("said", 1)],
    ]
    for kind in ("answers", "classes"):
        folder = tmp_path / kind
        folder.mkdir()
        writer = StoreWriter(folder, backend.get_vocab_size(), kind)
        for number, talk in enumerate(talks):
            parts = [backend.encode(text).ids for text, _ in talk]
            trains = [answer for part, (_, answer) in zip(parts, talk, strict=True) for _ in part]
            ids = np.concatenate(parts)
            writer.append(ids, np.array([len(ids)]), np.array(trains if kind == "answers" else [number]))
        writer.finish("t", {"name": "s", "eos": 0}, {}, [], tokenizer=backend.to_str())
        writer.close()
        rows = [json.loads(line) for line in command("data", "decode", folder).out.splitlines()]
        assert [row["text"] for row in rows] == ["".join(text for text, _ in talk) for talk in talks]
        if kind == "answers":
            assert [row["answers"] for row in rows] == [[text for text, answer in talk if answer] for talk in talks]
        else:
            assert [row["class"] for row in rows] == [0, 1, 2]


def test_inspect_tells_what_is_inside(store: Path, tmp_path: Path) -> None:
    ended = command("data", "inspect", store, "--json", "--report", tmp_path / "page.html")
    assert ended.code == 0, ended.err
    facts, opened = json.loads(ended.out), TokenStore.open(store)
    lengths = opened.lengths.tolist()
    assert (facts["documents"], facts["tokens"], facts["dtype"]) == (len(TEXTS), sum(lengths), "uint16")
    assert facts["lengths"] | {"histogram": None} == {
        "min": min(lengths),
        "mean": sum(lengths) / len(lengths),
        "max": max(lengths),
        "histogram": None,
    }
    bars = facts["lengths"]["histogram"]
    assert [count for *_, count in bars] == [sum(low <= n <= high for n in lengths) for low, high, _ in bars]
    assert sum(count for *_, count in bars) == len(TEXTS)
    assert facts["content_hash"] == opened.manifest.content_hash
    assert facts["inputs"][0]["path"].endswith("corpus.jsonl")
    assert [plan["seq_len"] for plan in facts["plans"]] == [32]
    assert [sample["document"] for sample in facts["samples"]] == list(range(len(TEXTS)))
    assert "".join(facts["samples"][8]["text"]) == f"{TEXTS[8]}<eos>"
    shown = command("data", "inspect", store).out
    assert f"{len(TEXTS)} documents, {sum(lengths):,} tokens" in shown
    assert "|def f(x):\\n    return x\\n<eos>|" in shown
    page = (tmp_path / "page.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert opened.manifest.content_hash in page
    assert not re.search(r"(src|href)=", page)


def test_prepare_writes_the_page_into_the_store(store: Path, tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_text("one text")
    recipe = tmp_path / "recipe.yaml"
    data = {"seq_len": 32, "tokenizer": str(tokenizer), "sources": [{"path": "corpus.txt"}, {"store": str(store)}]}
    data["sources"] = [{"path": str(tmp_path / "corpus.txt")}, {"store": str(store), "name": "given"}]
    values = {"name": "t", "output_dir": str(tmp_path), "adapter": {"kind": "none"}, "data": data}
    values |= {"model": {"config": {"model_type": "llama"}}, "batch": {"global_tokens": 32}, "train": {"tokens": 32}}
    recipe.write_text(json.dumps(values))
    ended = command("prepare", recipe)
    assert ended.code == 0, ended.err
    (page,) = (tmp_path / "data").glob("corpus-*/report.html")
    assert "one text" in page.read_text()
    assert command("data", "verify", page.parent).code == 0


@pytest.mark.matrix
def test_a_store_on_a_read_only_file_system_is_prepared_from(store: Path, tokenizer: Path, tmp_path: Path) -> None:
    if subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode:
        pytest.skip("mounting needs the right to")
    source, given = (
        shutil.copytree(store, tmp_path / "source", ignore=shutil.ignore_patterns("blocks-*", "*.html")),
        tmp_path / "ro",
    )
    given.mkdir()
    recipe = tmp_path / "recipe.yaml"
    data = {"seq_len": 32, "tokenizer": str(tokenizer), "sources": [{"store": str(given)}]}
    values = {"name": "t", "output_dir": str(tmp_path), "adapter": {"kind": "none"}, "data": data}
    values |= {"model": {"config": {"model_type": "llama"}}, "batch": {"global_tokens": 32}, "train": {"tokens": 32}}
    recipe.write_text(json.dumps(values))
    mount = f"mount --bind {source} {given} && mount -o remount,ro,bind {given}"
    prepare_there = f"{sys.executable} -m dist_cpt.cli prepare {recipe} --json"
    ended = subprocess.run(
        ["unshare", "-m", "sh", "-c", f"{mount} && {prepare_there}"], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout)["sources"][0]["documents"] == len(TEXTS)
    assert len(list((tmp_path / "data").glob("blocks-32-*/pieces.npy"))) == 1
    assert not list(source.glob("*.html*"))


@pytest.mark.parametrize("name", ["tokens.bin", "tokens.idx", "tokenizer.json", "blocks"])
def test_verify_names_file_and_chunk(store: Path, tmp_path: Path, name: str) -> None:
    copy = shutil.copytree(store, tmp_path / "copy")
    valid = command("data", "verify", copy)
    assert (valid.code, valid.err) == (0, "")
    assert "valid (5 chunks" in valid.out
    path = next(copy.glob("blocks-*/pieces.npy")) if name == "blocks" else copy / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    ended = command("data", "verify", copy)
    assert ended.code == 65
    (line,) = ended.error_lines
    assert f"{path}: chunk 0" in line
    found = json.loads(command("data", "verify", copy, "--json").out)
    assert len(found["problems"]) == 1
    path.write_bytes(content[:-1])
    assert command("data", "verify", copy).code == 65


def test_merged_stores_are_one_with_its_origin(store: Path, tokenizer: Path, tmp_path: Path) -> None:
    other = made(tmp_path / "b", tokenizer, ["one more", "{and another"])
    out = tmp_path / "merged"
    ended = command("data", "merge", store, other, store, "--out", out, "--json")
    assert ended.code == 0, ended.err
    parts, merged = [TokenStore.open(path) for path in (store, other, store)], TokenStore.open(out, verify=True)
    assert json.loads(ended.out)["documents"] == merged.num_documents == 2 * len(TEXTS) + 2
    np.testing.assert_array_equal(merged.tokens, np.concatenate([part.tokens for part in parts]))
    np.testing.assert_array_equal(merged.lengths, np.concatenate([part.lengths for part in parts]))
    origin = merged.manifest.source["merged"]
    assert [part["content_hash"] for part in origin] == [part.manifest.content_hash for part in parts]
    assert merged.manifest.counts["records"] == sum(part.manifest.counts["records"] for part in parts)
    assert len(merged.manifest.inputs) == 3
    assert texts_of(command("data", "decode", out).out) == [*TEXTS, "one more", "{and another", *TEXTS]
    assert command("data", "inspect", out).code == 0
    trained = made(tmp_path / "c", tokenizer, sources=[{"store": str(out)}])
    assert trained == out
    refused = command("data", "merge", store, other, "--out", out)
    assert (refused.code, "exists" in refused.err) == (64, True)


def test_counts_of_merged_stores_are_those_of_all(store: Path, tokenizer: Path, tmp_path: Path) -> None:
    policy = {"on_bad_record": "quarantine", "bad_record_budget_fraction": 0.9}
    bad = [made(tmp_path / name, tokenizer, ["fine", "nul \0"], **policy) for name in ("a", "b")]
    assert command("data", "merge", store, *bad, "--out", tmp_path / "out").code == 0
    counts = TokenStore.open(tmp_path / "out").manifest.counts
    assert (counts["records"], counts["bad"]) == (len(TEXTS) + 4, {"nul": 2})
    assert counts["first_bad"] == TokenStore.open(bad[0]).manifest.counts["first_bad"]
    assert len((tmp_path / "out/quarantine.jsonl").read_text().splitlines()) == 2
    assert "nul" in command("data", "inspect", tmp_path / "out", "--json").out


@pytest.mark.matrix
@settings(deadline=None, max_examples=30)
@given(
    texts=st.lists(
        st.text(st.characters(codec="utf-8", exclude_characters="\0<▁"), min_size=1), min_size=20, max_size=60
    )
)
@pytest.mark.parametrize("kind", [byte_level, llama_2_like, gemma_like])
def test_any_text_comes_back(tmp_path_factory: pytest.TempPathFactory, kind: Any, texts: list[str]) -> None:
    folder = tmp_path_factory.mktemp("any")
    kept = [text for text in texts if not text.isspace()]
    if kept:
        made_of = made(folder, saved(kind(), folder / "tokenizer"), texts)
        assert texts_of(command("data", "decode", made_of).out) == kept


def test_stores_made_otherwise_are_not_merged(store: Path, tokenizer: Path, tmp_path: Path) -> None:
    with_bos = made(tmp_path / "bos", tokenizer, bos="always")
    foreign = made(tmp_path / "foreign", saved(gemma_like(), tmp_path / "tokenizer"))
    labelled = tmp_path / "labelled"
    labelled.mkdir()
    manifest = TokenStore.open(store).manifest
    writer = StoreWriter(labelled, manifest.vocab_size, "classes")
    writer.append(np.array([3, 0]), np.array([2]), np.array([1]))
    writer.finish(manifest.tokenizer_hash, {"name": "l"}, {}, [])
    for other, difference in (
        (with_bos, r"tokenizer|BOS 1, not None"),
        (foreign, "tokenizer"),
        (labelled, "labels classes"),
    ):
        ended = command("data", "merge", store, other, "--out", tmp_path / "out")
        assert ended.code == 65
        assert re.search(difference, ended.err), ended.err
        assert not list(tmp_path.glob("out*"))
    assert command("data", "merge", store, "--out", tmp_path / "out").code == 64


def test_a_foreign_pair_is_shown_with_what_is_unknown(store: Path, tokenizer: Path, tmp_path: Path) -> None:
    """Two sequences a document, as Megatron-LM writes with --split-sentences."""
    ids = np.concatenate([TokenStore.open(store).document(number)[:-1] for number in (2, 8)])
    lengths = [10, 5, len(ids) - 15]
    header = np.zeros((), HEADER)
    header["magic"], header["version"], header["dtype"] = b"MMIDIDX\x00\x00", 1, 8
    header["sequences"], header["documents"] = 3, 3
    starts = 2 * np.concatenate([[0], np.cumsum(lengths)[:-1]])
    index = tmp_path / "theirs_text_document.idx"
    content = [header, np.array(lengths, "<i4"), starts.astype("<i8"), np.array([0, 2, 3], "<i8")]
    index.write_bytes(b"".join(part.tobytes() for part in content))
    index.with_suffix(".bin").write_bytes(ids.astype("<u2").tobytes())
    facts = json.loads(command("data", "inspect", index, "--json").out)
    assert (facts["documents"], facts["tokens"], facts["lengths"]["max"]) == (2, len(ids), len(ids) - 15)
    assert facts["unknown"] == ["tokenizer", "vocabulary", "source", "inputs", "hashes"]
    assert facts["samples"][0]["ids"] == [ids[:15].tolist()]
    assert "unknown: tokenizer" in command("data", "inspect", index.with_suffix("")).out
    assert "no hashes" in command("data", "verify", index).out
    ended = command("data", "decode", index)
    assert (ended.code, "--tokenizer" in ended.err) == (64, True)
    decoded = "".join(texts_of(command("data", "decode", index, "--tokenizer", tokenizer).out))
    assert decoded == TEXTS[2] + TEXTS[8]
    index.with_suffix(".bin").write_bytes(ids.astype("<u2").tobytes()[:-2])
    ended = command("data", "verify", index)
    assert (ended.code, "sequence 2" in ended.err) == (65, True)


def test_what_is_no_store_is_refused(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for name in ("inspect", "verify", "decode"):
        for path in (tmp_path / "absent", tmp_path / "folder"):
            ended = command("data", name, path)
            assert ended.code == 65
            assert len(ended.error_lines) == 1
