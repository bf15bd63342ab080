"""Which files a source names, and what reading does with records that are not documents."""

from __future__ import annotations

import errno
import gzip
import hashlib
import io
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from dist_cpt.data.filters import describe_filter
from dist_cpt.data.sources import (
    OnBadRecord,
    ReadCounts,
    Record,
    RecordTally,
    SourceFiles,
    check_budget,
    find_files,
    read_records,
    text_parser,
)
from dist_cpt.errors import EXIT_DATA, ConfigError, DataError, StorageError
from tests.errno_layer import ErrnoLayer


def read(path: Path, policy: OnBadRecord = "error", text: str = "text") -> tuple[list[Record[str]], ReadCounts, str]:
    quarantine = io.StringIO() if policy == "quarantine" else None
    tally = RecordTally(policy, quarantine)
    records = list(read_records("s", find_files(str(path), "s", ["*.png"]), text_parser(text), tally))
    return records, tally.counts, "" if quarantine is None else quarantine.getvalue()


def test_folder_is_read_recursively_in_path_order_without_hidden_and_ignored_files(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / "b" / "z.txt").write_text("z")
    (tmp_path / "a.md").write_text("a")
    (tmp_path / "c.jsonl").write_text('{"text": "c1"}\n{"text": "c2"}\n')
    (tmp_path / "photo.png").write_bytes(b"\x89PNG")
    (tmp_path / ".git" / "x.txt").write_text("hidden")
    (tmp_path / "b" / "loop").symlink_to(tmp_path)
    documents, counts, _ = read(tmp_path)
    assert [d.value for d in documents] == ["a", "z", "c1", "c2"]
    assert [d.origin.where for d in documents][2:] == [f"{tmp_path}/c.jsonl:1", f"{tmp_path}/c.jsonl:2"]
    assert counts.records == 4
    assert find_files(str(tmp_path), "s", ["*.png"]).ignored_files == 1
    with pytest.raises(DataError, match=r"photo\.png") as raised:
        find_files(str(tmp_path), "s")
    assert "ignore" in str(raised.value)


def test_glob_matches_each_file_once(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    for name in ("x/1.txt", "x/2.txt", "3.txt"):
        (tmp_path / name).write_text(name)
    assert [f.name for f in find_files(f"{tmp_path}/**", "s").files] == ["3.txt", "1.txt", "2.txt"]
    assert [f.name for f in find_files(f"{tmp_path}/x/[2]*.txt", "s").files] == ["2.txt"]


def test_text_field_line_endings_and_byte_order_mark(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    separator = json.dumps({"body": "a\u2028b"}, ensure_ascii=False)
    file.write_bytes(b'\xef\xbb\xbf{"body": "one"}\r\n' + separator.encode() + b'\n\n   \n{"body": " \\n "}')
    documents, counts, _ = read(file, text="body")
    assert [d.value for d in documents] == ["one", "a\u2028b"]
    assert (counts.records, counts.blank_lines, counts.empty) == (3, 2, 1)
    plain = tmp_path / "a.txt"
    plain.write_bytes(b"\xef\xbb\xbfa\r\nb")
    assert read(plain)[0][0].value == "a\r\nb"


BAD = {
    b'{"text": "\xff"}': ("invalid_utf8", "byte 10"),
    b'{"text": "\\ud800"}': ("invalid_utf8", "character 0"),
    b'{"text": "a"': ("bad_json", "JSON"),
    b"[" * 100_000: ("bad_json", "JSON"),
    b'["text"]': ("bad_json", "list"),
    b'{"body": "a"}': ("missing_field", "'text'"),
    b'{"text": null}': ("not_a_string", "'text'"),
    b'{"text": "a\\u0000b"}': ("nul", "NUL"),
}


@pytest.mark.parametrize("line", BAD, ids=range(len(BAD)))
def test_bad_record_by_policy(tmp_path: Path, line: bytes) -> None:
    reason, message = BAD[line]
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"text": "before"}\n' + line + b'\n{"text": "after"}\n')
    with pytest.raises(DataError) as raised:
        read(file)
    assert f"{file}:2" in str(raised.value)
    assert message in str(raised.value)
    assert raised.value.exit_code == EXIT_DATA

    for policy in ("skip", "quarantine"):
        documents, counts, quarantined = read(file, policy)
        assert [d.value for d in documents] == ["before", "after"]
        assert counts.bad == {reason: 1}
        assert counts.records == 3
        if policy == "skip":
            assert quarantined == ""
        else:
            record = json.loads(quarantined)
            assert (record["where"], record["reason"]) == (f"{file}:2", reason)
            assert record["record"].encode("utf-8", "surrogateescape") == line + b"\n"


@pytest.mark.parametrize("content", [b"a\xc3(", b"a\x00b"])
def test_plain_file_is_one_record(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.md").write_bytes(content)
    (tmp_path / "good.md").write_text("two\nlines")
    with pytest.raises(DataError, match=r"bad\.md"):
        read(tmp_path)
    documents, counts, _ = read(tmp_path, "skip")
    assert [d.value for d in documents] == ["two\nlines"]
    assert (counts.records, counts.num_bad) == (2, 1)


def test_budget_is_of_all_records_and_inclusive() -> None:
    counts = ReadCounts(records=1000, bad={"nul": 1}, first_bad="f:7: a NUL")
    check_budget("s", counts, 0.001)
    counts.bad["bad_json"] = 1
    with pytest.raises(DataError, match=r"2 of 1000 .*bad_json 1, nul 1.*f:7"):
        check_budget("s", counts, 0.001)


@pytest.mark.parametrize(
    ("make", "path", "message"),
    [
        (None, "absent.jsonl", "absent.jsonl"),
        (None, "*.jsonl", "*.jsonl"),
        ("a.png", "a.png", "a.png"),
        ("a.jsonl.lz4", "a.jsonl.lz4", ".jsonl"),
        ("a.png", "", "ignore"),
    ],
)
def test_unusable_path_is_named(tmp_path: Path, make: str | None, path: str, message: str) -> None:
    if make:
        (tmp_path / make).write_text("x")
    with pytest.raises(DataError) as raised:
        find_files(str(tmp_path / path), "legal")
    assert message in str(raised.value)
    assert "'legal'" in str(raised.value)


@pytest.mark.parametrize("path", ["", "*.jsonl", "b.jsonl"])
def test_a_pipe_is_an_error_at_once(tmp_path: Path, path: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n')
    os.mkfifo(tmp_path / "b.jsonl")
    with pytest.raises(DataError, match=r"b\.jsonl is not a regular file"):
        find_files(str(tmp_path / path), "s")
    os.mkfifo(tmp_path / "late.jsonl")  # made after the listing
    with pytest.raises(DataError, match=r"late\.jsonl: not a regular file"):
        list(read_records("s", SourceFiles([tmp_path / "late.jsonl"]), text_parser("text"), RecordTally()))


@pytest.mark.parametrize("path", ["", "*", "**/*.jsonl", "*/b.jsonl"])
def test_a_folder_that_cannot_be_listed_is_not_an_empty_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    for name in ("a", "c"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "b.jsonl").write_text('{"text": "x"}\n')
    whole = find_files(str(tmp_path / path), "s").files
    with ErrnoLayer(tmp_path).installed() as counting:
        find_files(str(tmp_path / path), "s")
    for at in range(len(counting.calls)):
        with ErrnoLayer(tmp_path, errno.ESTALE, at).installed():
            assert find_files(str(tmp_path / path), "s").files == whole
    monkeypatch.setenv("DIST_CPT_STORAGE_SECONDS", "0.1")
    for at in range(len(counting.calls)):
        with pytest.raises(StorageError), ErrnoLayer(tmp_path, errno.ESTALE, at, for_ever=True).installed():
            find_files(str(tmp_path / path), "s")


def test_a_read_that_fails_half_way_continues_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [json.dumps({"text": f"{number} " + "x" * 1000}) for number in range(3000)]
    for name, content in (
        ("a.jsonl", "\n".join(lines).encode()),
        ("b.jsonl.gz", gzip.compress("\n".join(lines).encode())),
    ):
        (tmp_path / name).write_bytes(content)
    (expected, _, _) = read(tmp_path)
    with ErrnoLayer(tmp_path, place=".jsonl").installed() as counting:
        read(tmp_path)
    reads = [at for at, (function, _) in enumerate(counting.calls) if function == "preadv"]
    assert len(reads) > 3
    for at in reads:
        with ErrnoLayer(tmp_path, errno.EIO, at, place=".jsonl").installed():
            assert [record.value for record in read(tmp_path)[0]] == [record.value for record in expected]


FILTERS = """
def short(record):
    return len(record["text"]) < 5

def forgets(record):
    record["text"]

def fails(record):
    return record["langu\\nage"] == "de"

number = 3
"""


def filtered(path: Path, name: str) -> tuple[list[str], ReadCounts]:
    tally = RecordTally("skip")
    files = replace(find_files(str(path), "s"), filter=name)
    return [record.value for record in read_records("s", files, text_parser("text"), tally)], tally.counts


def test_filter_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    (tmp_path / "my_filters.py").write_text(FILTERS)
    (texts / "a.jsonl").write_text('{"text": "one"}\n{"text": "longer"}\nno json\n{"text": "two"}\n')
    (texts / "b.txt").write_text("text")
    (texts / "c.txt").write_text("a long text")
    monkeypatch.syspath_prepend(tmp_path)
    read_texts, counts = filtered(texts, "my_filters:short")
    assert read_texts == ["one", "two", "text"]
    assert (counts.records, counts.filtered, counts.bad) == (6, 2, {"bad_json": 1})
    sha256 = hashlib.sha256(FILTERS.encode()).hexdigest()
    assert describe_filter("my_filters:short") == {"filter": "my_filters:short", "filter_sha256": sha256}
    assert describe_filter("builtins:bool")["filter_sha256"] is None
    for name, named in (("forgets", "NoneType"), ("fails", "KeyError")):
        with pytest.raises(DataError, match=named) as raised:
            filtered(texts, f"my_filters:{name}")
        assert "a.jsonl:1" in str(raised.value)
        assert "\n" not in str(raised.value)
    for name in ("my_filters:none", "my_filters:number", "no_such_module:f"):
        with pytest.raises(ConfigError, match=name):
            describe_filter(name)
