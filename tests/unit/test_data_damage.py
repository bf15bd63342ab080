"""Damaged files of every container, under every policy: one line, nothing lost in silence, every bad record counted."""

from __future__ import annotations

import io
import json
import random
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from dist_cpt.data.sources import (
    OTHER_FILES,
    OnBadRecord,
    ReadCounts,
    RecordTally,
    find_files,
    read_records,
    text_parser,
)
from dist_cpt.errors import DataError
from tests.container_files import COMPRESS, PLAIN, TEXTS

CONTAINERS = [name + compression for name in PLAIN for compression in COMPRESS]
KNOWS_ITS_END = ("a.parquet", "file.arrow", *(name for name in CONTAINERS if not name.endswith(tuple(PLAIN))))


def content_of(name: str) -> bytes:
    plain = next(known for known in PLAIN if name.startswith(known))
    return COMPRESS[name.removeprefix(plain)](PLAIN[plain]())


def damaged(content: bytes, kind: str, seed: int) -> bytes:
    generator = random.Random(seed)
    at = generator.randrange(len(content))
    if kind == "cut":
        return content[:at]
    if kind == "bits":
        changed = bytearray(content)
        for _ in range(generator.randrange(1, 6)):
            changed[generator.randrange(len(changed))] ^= 1 << generator.randrange(8)
        return bytes(changed)
    stretch = generator.randbytes(generator.randrange(1, 200))
    if kind == "overwritten":
        return content[:at] + stretch + content[at + len(stretch) :]
    return content[:at] + stretch + content[at:]  # inserted


def read(path: Path, policy: OnBadRecord) -> tuple[list[str], ReadCounts, list[dict[str, str]]]:
    quarantine = io.StringIO()
    tally = RecordTally(policy, quarantine if policy == "quarantine" else None)
    files = find_files(str(path), "s", ["*.jpg"])
    texts = [record.value for record in read_records("s", files, text_parser("text"), tally)]
    return texts, tally.counts, [json.loads(line) for line in quarantine.getvalue().splitlines()]


def check(path: Path, name: str, kind: str, seed: int) -> None:
    path.write_bytes(damaged(content_of(name), kind, seed))
    try:
        texts, counts, rows = read(path, "quarantine")
    except DataError as error:  # a member of an archive has another name now, and is not read whatever the policy
        if ".tar" not in name or "ignore" not in str(error):
            raise
        return
    assert (texts, counts) == read(path, "skip")[:2]
    assert counts.records == len(texts) + counts.empty + counts.num_bad
    assert Counter(row["reason"] for row in rows) == counts.bad
    by_file = Counter((row["where"].rsplit(":", 1)[0] if row["where"][-1].isdigit() else row["where"]) for row in rows)
    assert by_file == {file: sum(reasons.values()) for file, reasons in counts.bad_by_file.items()}
    assert all(row["where"].startswith(str(path)) and "\n" not in row["detail"] for row in rows)
    if counts.num_bad:
        with pytest.raises(DataError) as raised:
            read(path, "error")
        assert str(path) in str(raised.value)
        assert "\n" not in str(raised.value)
    else:
        assert read(path, "error")[0] == texts
    if kind == "cut":
        assert texts == TEXTS[: len(texts)]
        if len(texts) < len(TEXTS) and name in KNOWS_ITS_END:
            assert counts.num_bad == 1


@pytest.mark.parametrize("kind", ["cut", "bits", "overwritten", "inserted"])
@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json.zst", "a.csv", "a.parquet", "stream.arrow.xz", "a.tar.bz2"])
def test_damage_is_counted_and_named(tmp_path: Path, name: str, kind: str) -> None:
    for seed in range(3):
        check(tmp_path / name, name, kind, seed)


@pytest.mark.matrix
@pytest.mark.parametrize("kind", ["cut", "bits", "overwritten", "inserted"])
@pytest.mark.parametrize("name", CONTAINERS)
def test_any_damage_is_counted_and_named(tmp_path: Path, name: str, kind: str) -> None:
    for seed in range(3, 60):
        check(tmp_path / name, name, kind, seed)


@pytest.mark.parametrize("container", ["parquet", "arrow"])
def test_invalid_utf8_in_a_column_is_one_bad_record(tmp_path: Path, container: str) -> None:
    values = pa.array([b"one", b"\xff", None, b"four", b"five"], pa.binary()).view(pa.string())
    nested = pa.array([{"list": ["a"]}] * 5)
    table = pa.table({"text": values, "meta": nested, "kind": pa.array(["x"] * 5).dictionary_encode()})
    path = tmp_path / f"a.{container}"
    if container == "parquet":
        pyarrow.parquet.write_table(table, path)
    else:
        with pa.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table)
    texts, counts, rows = read(path, "quarantine")
    assert texts == ["one", "four", "five"]
    assert counts.bad == {"invalid_utf8": 1, "not_a_string": 1}
    assert [row["where"] for row in rows] == [f"{path}:2", f"{path}:3"]


def test_bad_records_are_counted_by_file_up_to_a_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dist_cpt.data.sources.COUNTED_FILES", 2)
    for number in range(4):
        (tmp_path / f"{number}.jsonl").write_text("no json\n[]\n{}\n")
    (tmp_path / "4.jsonl").write_text('{"text": "good"}\n')
    counts = read(tmp_path, "skip")[1]
    each = {"bad_json": 2, "missing_field": 1}
    assert counts.bad == {"bad_json": 8, "missing_field": 4}
    assert counts.bad_by_file == {
        str(tmp_path / "0.jsonl"): each,
        str(tmp_path / "1.jsonl"): each,
        OTHER_FILES: {"bad_json": 4, "missing_field": 2},
    }
