"""From text files to stores: real tokenizer, real files, and everything that can be wrong with them."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dist_cpt.config.resolve import resolve_paths
from dist_cpt.config.schema import RunConfig
from dist_cpt.data import unit_work
from dist_cpt.data.data_report import data_report, preview, report_lines
from dist_cpt.data.encode import TextEncoder
from dist_cpt.data.prepare import Progress, prepare
from dist_cpt.data.prepared import check_vocabulary, open_prepared
from dist_cpt.data.records import RawRecord
from dist_cpt.data.sources import Record
from dist_cpt.data.store import TokenStore
from dist_cpt.data.tokenizer import adds_bos, load_run_tokenizer, load_tokenizer, tokenizer_hash, vocabulary_size
from dist_cpt.errors import DataError, StorageError, WriteError
from tests.errno_layer import ErrnoLayer

TEXTS = ["Die Berufung ist zulässig.", "def f(x):\n    return x\n", "naïve 文字 🙂", "a", "  spaced  "]
SPECIALS = ["<eos>", "<pad>", "<s>"]


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE that, asked for its special tokens, puts <s> before and <eos> after a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS * 5, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A <eos>", special_tokens=[("<s>", 2), ("<eos>", 0)]
    )
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>", bos_token="<s>"
    ).save_pretrained(folder)
    return folder


def recipe(tmp_path: Path, tokenizer_folder: Path, **data: Any) -> RunConfig:
    values = {
        "name": "test",
        "output_dir": str(tmp_path / "runs"),
        "model": {"config": {"model_type": "llama"}},
        "adapter": {"kind": "none"},
        "data": {
            "seq_len": 32,
            "tokenizer": str(tokenizer_folder),
            "sources": [{"path": str(tmp_path / "corpus.jsonl")}],
        }
        | data,
        "batch": {"global_tokens": 64},
        "train": {"tokens": 64},
    }
    return resolve_paths(RunConfig.model_validate(values))


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return path


def cache_of(config: RunConfig) -> Path:
    assert config.data.cache_dir is not None
    return Path(config.data.cache_dir)


def leftovers(config: RunConfig) -> list[str]:
    cache = cache_of(config)
    return [p.name for p in cache.iterdir() if ".units-" in p.name] if cache.exists() else []


def encode(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """The documents that plain text becomes."""
    encoded = TextEncoder(tokenizer)([Record(text, RawRecord("here", text.encode())) for text in texts])
    assert encoded.labels is None
    assert not encoded.rejected
    ends = np.cumsum(encoded.lengths).tolist()
    assert (ends or [0])[-1] == len(encoded.ids)
    return [encoded.ids[start:end].tolist() for start, end in zip([0, *ends], ends, strict=False)]


# The tokenizer.


def test_each_document_has_exactly_one_bos_and_one_eos(tokenizer_folder: Path) -> None:
    tokenizer = load_tokenizer(str(tokenizer_folder))
    documents = encode(tokenizer, TEXTS)
    assert [tokenizer.decode(d[1:-1]) for d in documents] == TEXTS
    assert documents == [tokenizer.encode(t) for t in TEXTS]
    assert all(d[0] == 2 and d[-1] == 0 and min(d[1:-1]) > 2 for d in documents)


def test_an_eos_spelled_out_in_a_text_is_not_doubled(tokenizer_folder: Path) -> None:
    tokenizer = load_tokenizer(str(tokenizer_folder))
    documents = encode(tokenizer, ["<eos>", "one<eos>", "two<eos>three", "<eos><eos>four<eos><eos>"])
    assert [tokenizer.decode(d) for d in documents] == [f"<s>{t}<eos>" for t in ("one", "two", "three", "four")]
    assert encode(tokenizer, ["<eos>"]) == []


def test_hash_is_of_the_content_and_not_of_the_last_call(tokenizer_folder: Path) -> None:
    one, two = load_tokenizer(str(tokenizer_folder)), load_tokenizer(str(tokenizer_folder))
    one(["a", "b c d"], padding=True, truncation=True, max_length=2)
    assert tokenizer_hash(one) == tokenizer_hash(two)
    assert encode(one, TEXTS) == encode(two, TEXTS)
    assert vocabulary_size(two) == len(two)
    two.add_tokens(["zulässig"])
    assert tokenizer_hash(one) != tokenizer_hash(two)
    assert vocabulary_size(two) == vocabulary_size(one) + 1
    two = load_tokenizer(str(tokenizer_folder))
    two.eos_token = "<pad>"
    assert tokenizer_hash(one) != tokenizer_hash(two)


def test_unusable_tokenizers_are_named(tokenizer_folder: Path, tmp_path: Path) -> None:
    from transformers import ByT5Tokenizer

    with pytest.raises(DataError, match="absent"):
        load_tokenizer(str(tmp_path / "absent"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty"):
        load_tokenizer(str(tmp_path / "empty"))
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in tokenizer_folder.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    settings = json.loads((broken / "tokenizer_config.json").read_text())
    settings.pop("eos_token")
    (broken / "tokenizer_config.json").write_text(json.dumps(settings))
    (broken / "special_tokens_map.json").unlink(missing_ok=True)
    with pytest.raises(DataError, match=r"broken.*EOS"):
        load_tokenizer(str(broken))
    (broken / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"broken"):
        load_tokenizer(str(broken))
    ByT5Tokenizer().save_pretrained(tmp_path / "slow")
    with pytest.raises(DataError, match=r"slow.*ByT5Tokenizer"):
        load_tokenizer(str(tmp_path / "slow"))


# Preparing.


def test_stores_hold_the_documents_and_the_second_time_is_free(tokenizer_folder: Path, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "corpus.jsonl", [*TEXTS, "  ", "x<eos>y"])
    (tmp_path / "held.md").write_text("held out")
    config = recipe(tmp_path, tokenizer_folder, validation=[{"name": "held", "path": str(tmp_path / "held.md")}])
    with pytest.raises(DataError, match=r"manifest\.json.*dist-cpt prepare"):
        open_prepared(config)
    progress: list[Progress] = []
    prepared = prepare(config, progress.append)
    assert [now.source for now in progress] == ["corpus", "held"]
    size = (tmp_path / "corpus.jsonl").stat().st_size
    assert [now.total_bytes for now in progress] == [size + 8, size + 8]
    assert 0 < progress[0].num_bytes <= size < progress[1].num_bytes
    tokenizer = load_tokenizer(str(tokenizer_folder))
    store = prepared.sources[0].store
    assert [tokenizer.decode(store.document(i)) for i in range(store.num_documents)] == [
        f"<s>{t}<eos>" for t in [*TEXTS, "x", "y"]
    ]
    TokenStore.open(store.folder, verify=True)
    assert not leftovers(config)

    before = (store.folder / "tokens.bin").stat()
    again = prepare(config, lambda *_: pytest.fail("tokenised a finished store again"))
    assert (store.folder / "tokens.bin").stat() == before
    assert again.identity == prepared.identity == open_prepared(config).identity

    report = data_report(prepared)
    row = report["sources"][0]
    assert (row["records"], row["empty"], row["texts"], row["documents"], row["share"]) == (7, 1, 6, 7, 1.0)
    assert row["tokens"] == store.num_tokens
    assert row["blocks"] * 32 * (1 - row["padding_fraction"]) == pytest.approx(row["tokens"])
    assert report["validation"][0]["role"] == "domain"
    json.dumps(report)


def test_changed_text_or_tokenizer_is_noticed(tokenizer_folder: Path, tmp_path: Path) -> None:
    corpus = write_jsonl(tmp_path / "corpus.jsonl", TEXTS)
    config = recipe(tmp_path, tokenizer_folder)
    first = prepare(config)
    os.utime(corpus, ns=(1, 1))  # touched, not changed
    with pytest.raises(DataError, match=r"manifest\.json"):
        open_prepared(config)
    touched = prepare(config, lambda *_: pytest.fail("tokenised the same bytes again"))
    assert touched.sources[0].store.folder.samefile(first.sources[0].store.folder)
    assert touched.identity == first.identity == open_prepared(config).identity
    write_jsonl(corpus, [*TEXTS, "more"])
    assert prepare(config).identity != first.identity


def test_a_moved_corpus_with_its_stores_is_not_tokenised_again(tokenizer_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    write_jsonl(tmp_path / "old/corpus.jsonl", TEXTS)
    first = prepare(recipe(tmp_path / "old", tokenizer_folder))
    shutil.copytree(tmp_path / "old", tmp_path / "new", copy_function=shutil.copy)  # with other times
    shutil.rmtree(tmp_path / "old")
    config = recipe(tmp_path / "new", tokenizer_folder)
    moved = prepare(config, lambda *_: pytest.fail("tokenised the same bytes again"))
    assert moved.identity == first.identity == open_prepared(config).identity

    write_jsonl(tmp_path / "new/corpus.jsonl", [*TEXTS[:-1], TEXTS[-1].upper()])  # as many bytes, other ones
    assert prepare(config).identity != first.identity


def test_a_store_with_other_bytes_is_set_aside_and_made_again(tokenizer_folder: Path, tmp_path: Path) -> None:
    corpus = write_jsonl(tmp_path / "corpus.jsonl", TEXTS)
    config = recipe(tmp_path, tokenizer_folder)
    made = prepare(config).sources[0].store.folder
    os.utime(corpus, ns=(1, 1))
    linked = prepare(config).sources[0].store.folder
    assert linked.is_symlink()
    content = (made / "tokens.bin").read_bytes()
    for folder in (linked, linked):  # first a link to the store, then the store itself
        (folder / "tokens.bin").write_bytes(bytes(len(content)))
        assert prepare(config).sources[0].store.folder == folder  # a glance at sizes sees nothing
        prepare(config, verify=True)
        assert (folder / "tokens.bin").read_bytes() == content
    assert not linked.is_symlink()
    assert len(list(made.parent.glob("*.damaged-*"))) == 2


def test_the_order_of_documents_does_not_depend_on_threads(
    tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [f"{t} {i}" for i in range(200) for t in TEXTS]
    write_jsonl(tmp_path / "corpus.jsonl", texts)
    one = prepare(recipe(tmp_path, tokenizer_folder, cache_dir=str(tmp_path / "one")))
    monkeypatch.setattr(unit_work, "BATCH_RECORDS", 3)
    two = prepare(recipe(tmp_path, tokenizer_folder, cache_dir=str(tmp_path / "two")))
    assert one.identity == two.identity
    assert one.sources[0].store.num_documents == len(texts)


def test_an_interrupt_leaves_nothing_half_made_and_loses_nothing(tokenizer_folder: Path, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "corpus.jsonl", TEXTS)
    (tmp_path / "held.md").write_text("held out")
    config = recipe(tmp_path, tokenizer_folder, validation=[{"name": "held", "path": str(tmp_path / "held.md")}])

    def interrupt(now: Progress) -> None:
        if now.source == "held":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(config, interrupt)
    assert [p.parent.name.split("-")[0] for p in cache_of(config).glob("*/manifest.json")] == ["corpus"]  # and kept
    names: list[str] = []
    prepare(config, lambda now: names.append(now.source))
    assert names == ["held"]
    assert not leftovers(config)


def test_a_damaged_store_is_refused_on_open_and_made_again_by_prepare(tokenizer_folder: Path, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "corpus.jsonl", TEXTS)
    config = recipe(tmp_path, tokenizer_folder)
    prepared = prepare(config)
    bin_file = prepared.sources[0].store.folder / "tokens.bin"
    content = bin_file.read_bytes()
    bin_file.write_bytes(content[:-2])
    with pytest.raises(DataError, match=r"tokens\.bin"):
        open_prepared(config)
    assert prepare(config).identity == prepared.identity
    assert bin_file.read_bytes() == content
    (aside,) = cache_of(config).glob("*.damaged-*")  # never removed
    assert (aside / "tokens.bin").read_bytes() == content[:-2]
    bin_file.write_bytes(content[:-2])
    (tmp_path / "corpus.jsonl").unlink()
    with pytest.raises(DataError, match=r"corpus\.jsonl"):
        prepare(config)
    assert bin_file.read_bytes() == content[:-2]


@pytest.mark.parametrize("name", ["manifest.json", "tokens.bin", "tokens.idx"])
def test_a_store_that_cannot_be_read_is_neither_removed_nor_set_aside(
    tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    write_jsonl(tmp_path / "corpus.jsonl", TEXTS)
    config = recipe(tmp_path, tokenizer_folder)
    prepare(config)
    store = next(cache_of(config).glob("corpus-*"))
    before = {path.name: (path.stat().st_ino, path.read_bytes()) for path in store.rglob("*") if path.is_file()}
    names: list[str] = []
    with ErrnoLayer(store, errno.EIO, at=0, place=name).installed() as layer:
        prepare(config, lambda now: names.append(now.source))
    assert len(layer.calls) > 1
    assert names == []
    monkeypatch.setenv("DIST_CPT_STORAGE_SECONDS", "0.2")
    with (
        pytest.raises(StorageError, match=rf"{name}.*EIO"),
        ErrnoLayer(store, errno.EIO, at=0, place=name, for_ever=True).installed(),
    ):
        prepare(config)
    assert {path.name: (path.stat().st_ino, path.read_bytes()) for path in store.rglob("*") if path.is_file()} == before
    assert not list(cache_of(config).glob("*.*"))


def test_bad_records_by_policy_and_budget(tokenizer_folder: Path, tmp_path: Path) -> None:
    corpus = write_jsonl(tmp_path / "corpus.jsonl", TEXTS)
    corpus.write_bytes(corpus.read_bytes() + b"{broken\n")
    with pytest.raises(DataError, match=r"corpus\.jsonl:6.*JSON"):
        prepare(recipe(tmp_path, tokenizer_folder))
    config = recipe(tmp_path, tokenizer_folder, on_bad_record="quarantine")
    with pytest.raises(DataError, match=r"1 of 6 .*data.bad_record_budget_fraction"):
        prepare(config)
    assert leftovers(config)  # the tokens, for a larger budget
    config = recipe(tmp_path, tokenizer_folder, on_bad_record="quarantine", bad_record_budget_fraction=0.2)
    prepared = prepare(config)
    assert data_report(prepared)["sources"][0]["bad"] == {"bad_json": 1}
    quarantined = (prepared.sources[0].store.folder / "quarantine.jsonl").read_text()
    kept = [json.loads(line) for line in quarantined.splitlines()]
    assert [(k["where"], k["record"]) for k in kept] == [(f"{corpus}:6", "{broken\n")]
    with pytest.raises(
        DataError, match=r"1 of 6 .*data.bad_record_budget_fraction"
    ):  # the finished store, a stricter budget
        prepare(recipe(tmp_path, tokenizer_folder, on_bad_record="quarantine"))


@pytest.mark.parametrize("texts", [[], ["", "  \n"], ["<eos>"]])
def test_a_corpus_without_documents_is_refused(tokenizer_folder: Path, tmp_path: Path, texts: list[str]) -> None:
    write_jsonl(tmp_path / "corpus.jsonl", texts)
    config = recipe(tmp_path, tokenizer_folder)
    with pytest.raises(DataError, match=r"'corpus'.*corpus\.jsonl.*document"):
        prepare(config)
    assert not list(cache_of(config).glob("*/manifest.json"))


def test_ids_beyond_the_models_vocabulary_are_named(tokenizer_folder: Path, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "corpus.jsonl", TEXTS)
    prepared = prepare(recipe(tmp_path, tokenizer_folder))
    store = prepared.sources[0].store
    highest = int(store.tokens.max())
    check_vocabulary(prepared, highest + 1)
    document = next(i for i in range(store.num_documents) if highest in store.document(i))
    with pytest.raises(DataError, match=f"'corpus', document {document}: token id {highest} "):
        check_vocabulary(prepared, highest)


def test_a_cache_that_cannot_be_written_is_named(tokenizer_folder: Path, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "corpus.jsonl", TEXTS)
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match=r"token store.*data.cache_dir"):
        prepare(recipe(tmp_path, tokenizer_folder, cache_dir=str(tmp_path / "file")))


def test_a_source_that_changes_while_it_is_read_is_refused(tokenizer_folder: Path, tmp_path: Path) -> None:
    corpus = write_jsonl(tmp_path / "corpus.jsonl", TEXTS)
    with pytest.raises(DataError, match=r"corpus\.jsonl changed"):
        prepare(recipe(tmp_path, tokenizer_folder), lambda *_: os.utime(corpus, ns=(1, 1)))


def test_a_finished_store_whose_text_is_gone_is_used_if_it_is_the_only_one(
    tokenizer_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    corpus = write_jsonl(tmp_path / "corpus.jsonl", TEXTS)
    config = recipe(tmp_path, tokenizer_folder)
    made = prepare(config)
    folder = made.sources[0].store.folder
    corpus.unlink()
    again = prepare(config, lambda *_: pytest.fail("tokenised without text"), verify=True)
    (said,) = [record.getMessage() for record in caplog.records]
    assert f"{corpus} does not exist; its finished store is used: {folder}" in said
    assert again.identity == made.identity == open_prepared(config, [str(folder)]).identity
    with pytest.raises(DataError, match="does not exist"):
        prepare(recipe(tmp_path, tokenizer_folder, bos="never"))  # made with other settings
    write_jsonl(corpus, TEXTS[1:])
    prepare(config)
    corpus.unlink()
    with pytest.raises(DataError, match="2 finished stores") as raised:
        prepare(config)
    assert "store" in (raised.value.remedy or "")


# The beginning of a document.


@pytest.mark.parametrize(("bos", "first"), [("auto", 2), ("always", 2), ("never", None)])
def test_a_document_begins_as_the_tokenizer_begins_a_text(
    tmp_path: Path, tokenizer_folder: Path, bos: str, first: int | None
) -> None:
    """In the store, and in the tokenizer that checkpoints hold, also after it is loaded again."""
    write_jsonl(tmp_path / "corpus.jsonl", ["one", "<s>two", "three<eos>four", "five" * 40])
    config = recipe(tmp_path, tokenizer_folder, bos=bos)
    store = prepare(config).sources[0].store
    documents = [store.document(index).tolist() for index in range(store.num_documents)]
    assert len(documents) == 5
    assert [d.count(2) for d in documents] == ([1] * 5 if first else [0, 1, 0, 0, 0])  # one text spells it out
    assert all(d[0] == 2 for d in documents) or first is None
    tokenizer = load_run_tokenizer(config)
    tokenizer.save_pretrained(tmp_path / "saved")
    saved = load_tokenizer(str(tmp_path / "saved"))
    assert adds_bos(saved) == (first is not None)
    if bos == "never":
        assert saved("one").input_ids == documents[0][:-1]


def test_settings_of_bos_have_stores_of_their_own(tmp_path: Path, tokenizer_folder: Path) -> None:
    write_jsonl(tmp_path / "corpus.jsonl", TEXTS)
    stores = {bos: prepare(recipe(tmp_path, tokenizer_folder, bos=bos)) for bos in ("auto", "never")}
    assert stores["auto"].identity != stores["never"].identity
    assert len(list(cache_of(recipe(tmp_path, tokenizer_folder)).iterdir())) == 2


def test_a_store_from_before_documents_began_with_bos_is_not_taken(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_jsonl(tmp_path / "corpus.jsonl", TEXTS)
    config = recipe(tmp_path, tokenizer_folder)
    with monkeypatch.context() as earlier:
        earlier.setattr(TextEncoder, "describe", lambda *_: {})
        old = prepare(config).sources[0].store.folder
    assert not prepare(config).sources[0].store.folder.samefile(old)


def test_bos_asked_of_a_tokenizer_without_one(tmp_path: Path, tokenizer_folder: Path) -> None:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "tokenizer.json").write_bytes((tokenizer_folder / "tokenizer.json").read_bytes())
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    write_jsonl(tmp_path / "corpus.jsonl", TEXTS)
    with pytest.raises(DataError, match=r"data\.bos"):
        prepare(recipe(tmp_path, folder, bos="always"))


def test_a_llama_tokenizer_that_is_told_not_to_add_bos_keeps_to_it(tmp_path: Path) -> None:
    """Its class builds the post-processor from a key of tokenizer_config.json when it is loaded."""
    from transformers import LlamaTokenizer

    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, "▁": 3, "a": 4, "▁a": 5}
    LlamaTokenizer(vocab=vocabulary, merges=[("▁", "a")], add_bos_token=True).save_pretrained(tmp_path / "llama")
    assert adds_bos(load_tokenizer(str(tmp_path / "llama")))
    (tmp_path / "corpus.txt").write_text("a")
    source = [{"path": str(tmp_path / "corpus.txt")}]
    for bos, first in (("auto", 1), ("never", 5)):
        config = recipe(tmp_path, tmp_path / "llama", bos=bos, sources=source)
        assert prepare(config).sources[0].store.document(0)[0] == first
        load_run_tokenizer(config).save_pretrained(tmp_path / bos)
        assert adds_bos(load_tokenizer(str(tmp_path / bos))) == (bos == "auto")


# What is shown.


def test_dry_run_shows_files_and_documents_with_their_borders_and_writes_nothing(
    tmp_path: Path, tokenizer_folder: Path
) -> None:
    size = write_jsonl(tmp_path / "corpus.jsonl", ["one\ntwo", "x<eos>y", "long " * 100]).stat().st_size
    config = recipe(tmp_path, tokenizer_folder)
    shown = list(preview(config))
    assert shown[0] == f"corpus: 1 files, {size} bytes, to be prepared: {tmp_path / 'corpus.jsonl'}"
    assert shown[1:4] == ["corpus: <s>one\\ntwo<eos>", "corpus: <s>x<eos>", "corpus: <s>y<eos>"]
    assert shown[4].endswith("long <eos>")
    assert "[...]" in shown[4]
    assert not cache_of(config).exists()
    assert "prepared already" in (prepare(config) and next(iter(preview(config))))


def test_report_in_lines(tmp_path: Path, tokenizer_folder: Path) -> None:
    write_jsonl(tmp_path / "corpus.jsonl", TEXTS)
    prepared = prepare(recipe(tmp_path, tokenizer_folder))
    line, identity = report_lines(data_report(prepared))
    assert line.startswith("corpus: 5 documents, ")
    assert "100.0% of the blocks" in line
    assert identity == f"identity {prepared.identity}"


# A finished store in place of its text.


def test_a_store_needs_no_text_and_gives_the_same_data(tmp_path: Path, tokenizer_folder: Path) -> None:
    write_jsonl(tmp_path / "corpus.jsonl", TEXTS)
    made = prepare(recipe(tmp_path, tokenizer_folder))
    elsewhere = tmp_path / "elsewhere" / made.sources[0].store.folder.name
    made.sources[0].store.folder.rename(shutil.copytree(made.sources[0].store.folder, elsewhere).with_name("gone"))
    (tmp_path / "corpus.jsonl").unlink()
    config = recipe(tmp_path, tokenizer_folder, sources=[{"store": str(elsewhere)}])
    assert config.data.sources[0].name == "corpus"
    for opened in (prepare(config), open_prepared(config)):
        assert opened.identity == made.identity
    for wrong in ({"bos": "never"}, {"sources": [{"store": str(tmp_path / "absent")}]}):
        with pytest.raises(DataError):
            prepare(recipe(tmp_path, tokenizer_folder, **({"sources": [{"store": str(elsewhere)}]} | wrong)))
    (elsewhere / "tokens.bin").write_bytes(bytes(len((elsewhere / "tokens.bin").read_bytes())))
    with pytest.raises(DataError, match="chunk 0"):
        prepare(config, verify=True)
    assert elsewhere.is_dir()  # someone's product, not a cache: it stays where it is


@pytest.mark.parametrize("source", [{}, {"path": "a.jsonl", "store": "b"}])
def test_text_has_one_place(tmp_path: Path, tokenizer_folder: Path, source: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="store"):
        recipe(tmp_path, tokenizer_folder, sources=[source])
