"""Every container that is read: the same documents give the same tokens, and damage is one bad record."""

from __future__ import annotations

import io
import itertools
import json
import tarfile
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet
import pytest

from dist_cpt.config.resolve import resolve_paths
from dist_cpt.config.schema import RunConfig
from dist_cpt.data.chat import ConversationEncoder
from dist_cpt.data.containers import Part, read_container, suffix_of
from dist_cpt.data.prepare import prepare
from dist_cpt.data.prepared import Prepared
from dist_cpt.data.records import BadRecord, RawRecord
from dist_cpt.data.sources import RecordTally, SourceFiles, find_files, read_records, text_of, text_parser
from dist_cpt.data.store import BIN, IDX
from dist_cpt.errors import ConfigError, DataError
from tests.container_files import COMPRESS, PLAIN, TEXTS, archive, jsonl, table
from tests.tiny import write_corpus, write_tokenizer


def read(path: Path, text: str = "text", policy: Any = "error") -> tuple[list[str], RecordTally]:
    tally = RecordTally(policy)
    files = find_files(str(path), "s", ["*.jpg"], split="train")
    return [record.value for record in read_records("s", files, text_parser(text), tally)], tally


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("name", PLAIN)
def test_same_documents_from_every_container(tmp_path: Path, name: str, compression: str) -> None:
    path = tmp_path / (name + compression)
    path.write_bytes(COMPRESS[compression](PLAIN[name]()))
    texts, tally = read(path)
    assert texts == TEXTS
    assert (tally.counts.records, tally.counts.num_bad) == (len(TEXTS), 0)


def test_same_documents_from_saved_data_sets(tmp_path: Path) -> None:
    dataset = datasets.Dataset(table())
    dataset.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=dataset, test=dataset.select([0])).save_to_disk(tmp_path / "splits")
    dataset.select(range(len(TEXTS) - 1, -1, -1)).save_to_disk(tmp_path / "reversed")
    assert read(tmp_path / "one")[0] == TEXTS
    assert read(tmp_path / "splits")[0] == TEXTS
    assert read(tmp_path / "reversed")[0] == TEXTS[::-1]
    with pytest.raises(DataError, match="train, test"):
        list(read_records("s", SourceFiles([tmp_path / "splits"]), text_parser("text"), RecordTally()))


def recipe(folder: Path, tokenizer: Path, source: Path, **more: Any) -> RunConfig:
    values = {
        "name": "test",
        "output_dir": str(folder / "runs"),
        "model": {"config": {"model_type": "llama"}},
        "adapter": {"kind": "none"},
        "data": {"seq_len": 32, "tokenizer": str(tokenizer), "sources": [{"path": str(source), "name": "s"} | more]},
        "batch": {"global_tokens": 64},
        "train": {"tokens": 64},
    }
    return resolve_paths(RunConfig.model_validate(values))


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Prepared]:
    """A tokenizer, the texts as a folder of text files, and what is prepared of them."""
    folder = tmp_path_factory.mktemp("expected")
    tokenizer = write_tokenizer(folder / "tokenizer", write_corpus(folder))
    texts = folder / "texts"
    texts.mkdir()
    for number, text in enumerate(TEXTS):
        (texts / f"{number}.txt").write_bytes(text.encode())
    return tokenizer, texts, prepare(recipe(folder, tokenizer, texts))


def require_same(expected: tuple[Path, Path, Prepared], folder: Path, source: Path, **more: Any) -> None:
    tokenizer, _, prepared = expected
    made = prepare(recipe(folder, tokenizer, source, **more))
    assert made.identity == prepared.identity, source
    files = [[(s.store.folder / name).read_bytes() for name in (BIN, IDX)] for p in (made, prepared) for s in p.sources]
    assert files[0] == files[1]


# Each container once, each compression at least once; the matrix has all pairs.
@pytest.mark.parametrize(("name", "compression"), list(zip(PLAIN, itertools.cycle(COMPRESS), strict=False)))
def test_same_tokens_and_identity_from_every_container(
    expected: tuple[Path, Path, Prepared], tmp_path: Path, name: str, compression: str
) -> None:
    path = tmp_path / (name + compression)
    path.write_bytes(COMPRESS[compression](PLAIN[name]()))
    require_same(expected, tmp_path, path, ignore=["*.jpg"])


@pytest.mark.matrix
@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("name", PLAIN)
def test_same_tokens_and_identity_from_every_pair(
    expected: tuple[Path, Path, Prepared], tmp_path: Path, name: str, compression: str
) -> None:
    test_same_tokens_and_identity_from_every_container(expected, tmp_path, name, compression)


def test_same_tokens_and_identity_from_token_files_data_sets_and_mixed_folders(
    expected: tuple[Path, Path, Prepared], tmp_path: Path
) -> None:
    require_same(expected, tmp_path / "1", expected[2].sources[0].store.folder / IDX)
    datasets.Dataset(table()).save_to_disk(tmp_path / "saved")
    require_same(expected, tmp_path / "2", tmp_path / "saved")
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    lines, half = jsonl().splitlines(keepends=True), len(TEXTS) // 2
    (mixed / "1.jsonl.xz").write_bytes(COMPRESS[".xz"](b"".join(lines[:half])))
    pyarrow.parquet.write_table(table().slice(half), mixed / "2.parquet")
    require_same(expected, tmp_path / "3", mixed)


def test_token_files_of_several_sequences_per_document_and_another_type(tmp_path: Path) -> None:
    """As Megatron-LM writes them when it splits documents into sentences."""
    from dist_cpt.data.store import HEADER, MAGIC

    documents = [[np.array([1, 2]), np.array([3])], [np.array([4])], []]
    sequences = [sequence.astype("<i8") for document in documents for sequence in document]
    header = np.zeros((), HEADER)
    header["magic"], header["version"], header["dtype"] = MAGIC, 1, 5
    header["sequences"], header["documents"] = len(sequences), len(documents) + 1
    lengths = np.array([len(sequence) for sequence in sequences], "<i4")
    pointers = np.array([0, 16, 24], "<i8")
    borders = np.array([0, 2, 3, 3], "<i8")
    (tmp_path / "a.bin").write_bytes(b"".join(sequence.tobytes() for sequence in sequences))
    index = tmp_path / "a.idx"
    index.write_bytes(header.tobytes() + lengths.tobytes() + pointers.tobytes() + borders.tobytes())
    assert find_files(str(tmp_path), "s").files == find_files(str(tmp_path / "a.bin"), "s").files == [index]
    contents = [record.content for record in read_container(Part(index)) if record is not None]
    assert [content.tolist() for content in contents if isinstance(content, np.ndarray)] == [[1, 2, 3], [4], []]
    (tmp_path / "a.bin").write_bytes(b"\0" * 24)
    *_, damaged = read_container(Part(index))
    assert damaged is not None
    assert damaged.bad is not None


# What is left of a file that lost its second half: every record before the damage, and one bad record.
@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet", "file.arrow", "stream.arrow", "a.tar"])
def test_cut_file_is_one_bad_record(tmp_path: Path, name: str, compression: str) -> None:
    content = COMPRESS[compression](PLAIN[name]())
    path = tmp_path / (name + compression)
    path.write_bytes(content[: len(content) * 9 // 10])
    texts, tally = read(path, policy="skip")
    assert texts == TEXTS[: len(texts)]
    assert tally.counts.num_bad == 1, tally.counts
    with pytest.raises(DataError, match=path.name):
        read(path)


@pytest.mark.parametrize(
    "name", ["a.jsonl.gz", "a.parquet", "a.arrow", "a.json", "a.tar", "a.idx", "a.jsonl.zst", "a.csv.xz"]
)
def test_file_of_other_bytes_is_bad_not_a_crash(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x00\xffnothing that any of these formats starts with" * 9)
    (tmp_path / "a.bin").write_bytes(b"")
    (tmp_path / "b.txt").write_text("kept")
    texts, tally = read(tmp_path if name == "a.idx" else tmp_path / name, policy="skip")
    assert texts == (["kept"] if name == "a.idx" else [])
    assert tally.counts.num_bad >= 1


def test_bad_rows_of_csv_and_elements_of_an_array_are_rejected_alone(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b'text,n\r\none,1\r\ntwo\r\n"thr"ee,3\r\n\xff,4\r\n\r\nfive,5\r\n')
    texts, tally = read(tmp_path / "a.csv", policy="skip")
    assert texts == ["one", "five"]
    assert tally.counts.bad == {"wrong_columns": 1, "bad_csv": 1, "invalid_utf8": 1}
    assert tally.counts.blank_lines == 1
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf [{"text": "one"}, 7, {"n": 1}, {"text": "four"}]\n')
    texts, tally = read(tmp_path / "a.json", policy="skip")
    assert texts == ["one", "four"]
    assert tally.counts.bad == {"bad_json": 1, "missing_field": 1}


def test_damaged_member_of_an_archive_hides_no_other(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, content in (("1.txt", b"one"), ("2.jsonl.gz", b"no gzip"), ("3.txt", b"three"), (".hidden", b"")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    texts, tally = read(tmp_path / "a.tar", policy="skip")
    assert texts == ["one", "three"]
    assert tally.counts.bad == {"damaged_file": 1}
    (tmp_path / "b.tar").write_bytes(archive())
    with pytest.raises(DataError, match="jpg") as raised:
        list(read_records("s", find_files(str(tmp_path / "b.tar"), "s"), text_parser("text"), RecordTally("skip")))
    assert "ignore" in str(raised.value)


def test_fields_dotted_paths_and_templates() -> None:
    record = {"title": "T", "body": "B {x}", "meta": {"lang": {"name": "de"}}, "a.b": "literal", "a": {"b": "nested"}}
    assert text_of(record, "body") == "B {x}"
    assert text_of(record, "meta.lang.name") == "de"
    assert text_of(record, "a.b") == "literal"
    assert text_of(record, "{title}\n\n{body} ({{{meta.lang.name}}})") == "T\n\nB {x} ({de})"
    for text in ("meta.none", "{title.x}", "{title.__class__}", "{meta}"):
        with pytest.raises(BadRecord):
            text_of(record, text)


@pytest.mark.parametrize("text", ["{}", "{title", "{title!r}", "{title:>9}", "title}"])
def test_template_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    from dist_cpt.config.load import load_recipe

    path = tmp_path / "recipe.yaml"
    config = recipe(tmp_path, tmp_path, tmp_path)
    values = config.model_dump(mode="json")
    values["data"]["sources"][0]["text"] = text
    path.write_text(json.dumps(values))
    with pytest.raises(ConfigError, match="text"):
        load_recipe(path)


MESSAGES = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
CONVERSATIONS = {
    "messages": {"messages": MESSAGES},
    "sharegpt": {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]},
    "alpaca": {"instruction": "2+2?", "input": "", "output": "4"},
}


@pytest.mark.parametrize("kind", CONVERSATIONS)
def test_conversations_in_each_notation(tmp_path: Path, kind: str) -> None:
    from dist_cpt.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(str(write_tokenizer(tmp_path / "tokenizer", write_corpus(tmp_path))), None)
    source = recipe(tmp_path, tmp_path, tmp_path).data.sources[0]
    parse = ConversationEncoder(tokenizer, "", 32).parser(source)
    assert parse(RawRecord("a.jsonl:1", json.dumps(CONVERSATIONS[kind]).encode())) == MESSAGES
    assert parse(RawRecord("a.parquet:1", CONVERSATIONS[kind])) == MESSAGES
    with pytest.raises(BadRecord):
        parse(RawRecord("a.txt", b"2+2?", is_text=True))


def test_alpaca_input_and_system_and_unknown_roles(tmp_path: Path) -> None:
    from dist_cpt.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(str(write_tokenizer(tmp_path / "tokenizer", write_corpus(tmp_path))), None)
    parse = ConversationEncoder(tokenizer, "", 32).parser(recipe(tmp_path, tmp_path, tmp_path).data.sources[0])
    record = {"instruction": "Add.", "input": "2 2", "output": "4", "system": "Be brief."}
    system, user, assistant = parse(RawRecord("a:1", record)) or []
    assert (system["content"], user["content"], assistant["content"]) == ("Be brief.", "Add.\n\n2 2", "4")
    with pytest.raises(BadRecord):
        parse(RawRecord("a:1", {"conversations": [{"from": "tool", "value": "x"}]}))


def test_names_of_files() -> None:
    assert suffix_of("A.JSONL.GZ") == ".jsonl.gz"
    assert suffix_of("a.tar.zst") == ".tar.zst"
    assert suffix_of("a.zst") is None
