"""What is there twice, or in a held-out set: against a plain search, and what excluding it means for a run."""

from __future__ import annotations

import json
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_cpt.config.load import load_recipe
from dist_cpt.config.resolve import resolve_paths
from dist_cpt.config.schema import RunConfig
from dist_cpt.data import duplicates as duplicates_module
from dist_cpt.data import overlap as overlap_module
from dist_cpt.data.concerns import concerns
from dist_cpt.data.data_report import data_report, report_lines
from dist_cpt.data.duplicates import document_hashes, exact_duplicates, find_duplicates, near_duplicates, ngram_hashes
from dist_cpt.data.loader import BlockLoader
from dist_cpt.data.overlap import NGRAM, PASSAGE, HeldOutNGrams
from dist_cpt.data.prepare import prepare
from dist_cpt.data.prepared import open_prepared
from dist_cpt.data.store import StoreManifest, TokenStore
from dist_cpt.errors import ConfigError, DataError, MissingExtraError
from tests.tiny import write_corpus, write_tokenizer

EOS, PAD = 0, 1


class Documents(TokenStore):
    """A store in memory: `documents` are ids without EOS."""

    def __init__(
        self,
        documents: list[list[int]],
        bos: int | None = None,
        classes: list[int] | None = None,
        answers: list[int] | None = None,
    ) -> None:
        ends = [[*([] if bos is None else [bos]), *ids, EOS] for ids in documents]
        self.tokens = np.array([token for ids in ends for token in ids], dtype=np.uint16)
        self.lengths = np.array([len(ids) for ids in ends], dtype=np.int32)
        self._pointers = 2 * (np.cumsum(self.lengths, dtype=np.int64) - self.lengths)
        self.num_documents, self.num_tokens = len(ends), len(self.tokens)
        self.answers = None if answers is None else np.array(answers, dtype=np.uint8)
        self.classes = None if classes is None else np.array(classes, dtype=np.int32)
        self.manifest = StoreManifest(2, 100, "", "uint16", len(ends), self.num_tokens, 99, {}, {"bos": bos}, {}, [])


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks that documents and passages cross."""
    monkeypatch.setattr(duplicates_module, "_CHUNK", 7)
    monkeypatch.setattr(overlap_module, "_CHUNK", 16)


def test_document_hashes_are_the_polynomial_whatever_the_chunks(small_chunks: None) -> None:
    documents = [[5], [1, 2, 3, 4, 5, 6], [], list(range(1, 40)), [5]]
    hashes = document_hashes(Documents(documents)).tolist()
    m = int(duplicates_module.MULTIPLIER)
    assert hashes == [sum((t + 1) * m**i for i, t in enumerate([*ids, EOS])) % 2**64 for ids in documents]


@given(st.lists(st.lists(st.lists(st.integers(1, 2), max_size=9), min_size=1, max_size=6), min_size=1, max_size=4))
@settings(max_examples=60, deadline=None)
def test_exact_duplicates_are_those_of_a_plain_search(sources: list[list[list[int]]]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(duplicates_module, "_CHUNK", 7)
        found = exact_duplicates([Documents(source) for source in sources])
    seen: set[tuple[int, ...]] = set()
    for source, repeated in zip(sources, found, strict=True):
        expected = []
        for number, ids in enumerate(source):
            expected += [number] * (tuple(ids) in seen)
            seen.add(tuple(ids))
        assert repeated.tolist() == expected


def test_one_text_in_two_classes_is_no_duplicate() -> None:
    store = Documents([[1, 2], [1, 2], [1, 2]], classes=[0, 1, 1])
    assert [part.tolist() for part in exact_duplicates([store])] == [[2]]


def test_documents_with_equal_hashes_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates_module, "document_hashes", lambda store: np.zeros(store.num_documents, np.uint64))
    assert [part.tolist() for part in exact_duplicates([Documents([[1], [2], [1]])])] == [[2]]


def test_near_duplicates_are_found_across_sources_and_others_are_not() -> None:
    generator = np.random.default_rng(0)
    first, other = (generator.integers(1, 90, 400).tolist() for _ in range(2))
    changed = [*first[:200], 91, *first[201:]]
    found = near_duplicates([Documents([first, other, [3]]), Documents([[4], changed, other, [3]])])
    assert [part.tolist() for part in found] == [[], [1, 2, 3]]


def test_near_duplicates_without_their_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasketch", None)
    with pytest.raises(MissingExtraError, match=r"dist-cpt\[dedup\]"):
        find_duplicates([Documents([[1]])], "near")


def plain_overlap(train: list[list[int]], held_out: list[list[int]]) -> tuple[list[int], int]:
    """(documents with a passage, shared n-grams), by comparing tuples."""
    owners: dict[tuple[int, ...], int] = {}
    for ids in held_out:
        for at in range(len(ids) - NGRAM + 1):
            gram = tuple(ids[at : at + NGRAM])
            owners[gram] = min(owners.get(gram, PASSAGE), len(ids))
    documents, shared = [], set()
    for number, ids in enumerate(train):
        grams = [tuple(ids[at : at + NGRAM]) for at in range(len(ids) - NGRAM + 1)]
        shared |= {gram for gram in grams if gram in owners}
        marks = [0, *(int(gram in owners) for gram in grams), 0]
        borders = [at for at, (left, right) in enumerate(pairwise(marks)) if left != right]
        for begin, end in zip(borders[::2], borders[1::2], strict=True):
            needed = min(len(ids), *(owners[gram] for gram in grams[begin:end]))
            if end - begin + NGRAM - 1 >= needed:
                documents.append(number)
                break
    return documents, len(shared)


@pytest.mark.parametrize("bos", [None, 98])
def test_overlap_is_that_of_a_plain_search(small_chunks: None, bos: int | None) -> None:
    generator = np.random.default_rng(1)

    def text(length: int) -> list[int]:
        return generator.integers(1, 90, length).tolist()

    held_out = [text(length) for length in (200, 30, 13, 12, 60)]
    train = [text(80) for _ in range(4)]
    train += [
        [*text(9), *held_out[0][40 : 40 + PASSAGE], *text(9)],  # a passage
        [*text(9), *held_out[0][40 : 40 + PASSAGE - 1], *text(9)],  # one token less
        held_out[0][100:120],  # all of a short document
        [*text(20), *held_out[1], *text(20)],  # a whole held-out document
        [*text(20), *held_out[1][1:], *text(20)],
        [*held_out[2], *text(3)],
        held_out[3],  # shorter than an n-gram
        [*held_out[4][:30], 91, *held_out[4][30:]],
        [*held_out[4], *held_out[0]],
    ]
    documents, shared = plain_overlap(train, held_out)
    assert {4, 6, 7, 9, 12} == set(documents)
    ngrams = HeldOutNGrams([Documents(held_out[:2], bos), Documents(held_out[2:], bos)])
    found = ngrams.overlap(Documents(train, bos))
    assert found.documents.tolist() == documents
    assert int(found.shared.sum()) == shared
    assert ngrams.counts.tolist() == [188 + 18, 1 + 48]


def test_of_conversations_only_the_answers_are_compared(small_chunks: None) -> None:
    generator = np.random.default_rng(2)
    template = list(range(60, 85))  # in every conversation, and long enough for n-grams

    def text(length: int) -> list[int]:
        return generator.integers(1, 60, length).tolist()

    def store(talks: list[list[list[int]]]) -> Documents:
        talks_ids = [[token for answer in talk for token in (*template, *answer)] for talk in talks]
        marks = [[mark for answer in talk for mark in (*[0] * len(template), *[1] * len(answer))] for talk in talks]
        return Documents(talks_ids, answers=[mark for talk in marks for mark in (*talk, 1)])  # EOS is trained on

    held_out = [[text(20), text(120)], [text(14)], [text(5)]]
    train = [
        [text(30), text(40)],
        [text(9), held_out[0][0]],  # a whole answer
        [[*text(9), *held_out[0][0]], held_out[2][0]],  # and as a part of a longer one; the other is too short
        [held_out[0][0][:-1]],
        [[*text(9), *held_out[0][1][30 : 30 + PASSAGE]]],
        [[*held_out[0][1][30 : 30 + PASSAGE - 1], *text(9)], text(3)],
        [[*held_out[1][0], *text(2)]],
    ]
    flat = [(number, answer) for number, talk in enumerate(train) for answer in talk]
    found, shared = plain_overlap([answer for _, answer in flat], [answer for talk in held_out for answer in talk])
    expected = sorted({flat[at][0] for at in found})
    assert {1, 2, 4, 6} <= set(expected)
    ngrams = HeldOutNGrams([store(held_out)])
    overlap = ngrams.overlap(store(train))
    assert overlap.documents.tolist() == expected
    assert int(overlap.shared.sum()) == shared
    assert ngrams.counts.tolist() == [8 + 108 + 2]


def test_no_ngram_no_overlap() -> None:
    found = HeldOutNGrams([Documents([[1, 2]])]).overlap(Documents([[1, 2]]))
    assert (found.documents.tolist(), found.shared.tolist()) == ([], [0])
    assert len(ngram_hashes(np.arange(3), 5)) == 0


def write_texts(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


@pytest.fixture
def values(tmp_path: Path) -> dict[str, Any]:
    """Two sources that share a document, and a held-out set whose first document is also in the second."""
    corpus = write_corpus(tmp_path, 8)
    texts = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    held_out = [json.loads(line)["text"] for line in (tmp_path / "held-out.jsonl").read_text().splitlines()]
    return {
        "name": "test",
        "output_dir": str(tmp_path / "runs"),
        "model": {"config": {"model_type": "llama"}},
        "adapter": {"kind": "none"},
        "data": {
            "seq_len": 32,
            "tokenizer": str(write_tokenizer(tmp_path / "tokenizer", corpus)),
            "sources": [
                {"name": "a", "path": str(write_texts(tmp_path / "a.jsonl", texts[:5]))},
                {"name": "b", "path": str(write_texts(tmp_path / "b.jsonl", [texts[6], texts[1], held_out[0]]))},
            ],
            "validation": [{"name": "v", "path": str(write_texts(tmp_path / "v.jsonl", held_out[:2]))}],
        },
        "batch": {"global_tokens": 64},
        "train": {"tokens": 64},
    }


def config(values: dict[str, Any], **data: Any) -> RunConfig:
    return resolve_paths(RunConfig.model_validate(values | {"data": values["data"] | data}))


def test_overlap_is_reported_and_nothing_left_out_by_default(values: dict[str, Any]) -> None:
    prepared = prepare(config(values))
    report = data_report(prepared)
    assert [row["overlapping_documents"] for row in report["sources"]] == [0, 1]
    assert [row["excluded_documents"] for row in report["sources"]] == [0, 0]
    (row,) = report["validation"]
    assert row["in_training"]["a"] == 0.0
    assert 0.4 < row["in_training"]["b"] < 0.6
    assert f"{row['in_training']['b']:.2%}" in "\n".join(report_lines(report))
    said = concerns(prepared, BlockLoader(prepared, 32, 0, PAD), 1)
    assert [line for line in said if "data.decontaminate" in line] == [line for line in said if "source b" in line]
    assert len([line for line in said if "source b" in line]) == 1
    assert prepare(config(values)).identity == prepared.identity


def test_excluded_documents_get_no_block_and_stores_stay_the_same(values: dict[str, Any]) -> None:
    plain = prepare(config(values))
    prepared = prepare(config(values, deduplicate="exact", decontaminate="drop"))
    assert [s.store.folder for s in prepared.all_sources] == [s.store.folder for s in plain.all_sources]
    assert [None if s.excluded is None else s.excluded.tolist() for s in prepared.sources] == [None, [1, 2]]
    assert prepared.identity != plain.identity
    assert prepared.identity != prepare(config(values, deduplicate="exact")).identity
    assert open_prepared(config(values, deduplicate="exact", decontaminate="drop")).identity == prepared.identity
    loader = BlockLoader(prepared, 32, 0, PAD)
    read: list[int] = []
    for position in range(200):
        if loader.describe(position)[:2] == ("b", 0):
            ids = loader.batch([position]).input_ids[0].tolist()
            read += [token for token in ids if token != PAD]
    said = "\n".join(concerns(prepared, loader, 1))
    assert "source b: 1 of 3 documents are duplicates" in said
    assert "data.decontaminate" not in said
    assert sorted(read) == sorted(prepared.sources[1].store.document(0).tolist())


def test_findings_are_made_once_and_again_when_damaged(values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    identity = prepare(config(values, deduplicate="exact", decontaminate="drop")).identity
    folder = Path(values["output_dir"]) / "data"
    files = sorted(folder.glob("*.npz"))
    assert len(files) == 3  # of duplicates, and of the overlap of two sources
    for file in files:
        file.write_bytes(file.read_bytes()[:-30])
    assert open_prepared(config(values, deduplicate="exact", decontaminate="drop")).identity == identity
    monkeypatch.setattr("dist_cpt.data.quality.HeldOutNGrams", None)
    monkeypatch.setattr("dist_cpt.data.quality.find_duplicates", None)
    assert open_prepared(config(values, deduplicate="exact", decontaminate="drop")).identity == identity


def test_a_source_without_a_document_left_is_refused(values: dict[str, Any]) -> None:
    values["data"]["sources"][1]["path"] = values["data"]["sources"][0]["path"]
    with pytest.raises(DataError, match="5 duplicates"):
        prepare(config(values, deduplicate="exact"))


def test_drop_without_a_held_out_set_is_refused(values: dict[str, Any], tmp_path: Path) -> None:
    values["data"] |= {"validation": [], "decontaminate": "drop"}
    (tmp_path / "recipe.yaml").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match="held-out"):
        load_recipe(tmp_path / "recipe.yaml")
