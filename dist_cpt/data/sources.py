"""Files of text -> documents. Which files a source names, and what counts as a bad record in them."""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, TextIO, TypeVar

from dist_cpt.config.schema import SourceConfig, ValidationConfig
from dist_cpt.errors import DataError

SUFFIXES = (".jsonl", ".txt", ".md")
OnBadRecord = Literal["error", "skip", "quarantine"]
T = TypeVar("T")
Parse = Callable[[bytes, bool], T | None]  # (raw bytes, is jsonl) -> the record, or None where there is nothing in it


@dataclass(frozen=True)
class Document:
    """One document as it stands in its file; `doc_id` is `file:line` for jsonl and `file` otherwise."""

    text: str
    source: str
    doc_id: str


@dataclass
class SourceFiles:
    """The files a source names, in reading order, and how many files beside them were of another kind."""

    files: list[Path]
    ignored_files: int


@dataclass
class ReadCounts:
    """What reading met. `records` are non-blank jsonl lines and whole txt or md files, bad ones included."""

    records: int = 0
    blank_lines: int = 0
    empty: int = 0  # records with nothing but white space
    bad: dict[str, int] = field(default_factory=dict)  # by reason
    first_bad: str | None = None  # where: reason

    @property
    def num_bad(self) -> int:
        return sum(self.bad.values())


@dataclass(frozen=True)
class Record(Generic[T]):
    """One record with its place, and its bytes for the case that it turns out to be bad."""

    value: T
    where: str  # as Document.doc_id
    raw: bytes


class BadRecord(Exception):
    """What is wrong with one record: `reason` is counted, `detail` shown."""

    def __init__(self, reason: str, detail: str) -> None:
        self.reason = reason
        self.detail = detail
        super().__init__(detail)


def find_files(path: str, name: str) -> SourceFiles:
    """Files of a source: a file, a folder (recursive, hidden entries left out) or a glob pattern; sorted.

    Raises:
        DataError: nothing there, or nothing there that can be read.
    """
    target = Path(path)
    supported = f"supported are {', '.join(SUFFIXES)}"
    if target.is_file():
        if target.suffix.lower() not in SUFFIXES:
            raise DataError(f"source {name!r}: {path} has the unknown suffix {target.suffix!r}", remedy=supported)
        return SourceFiles([target], 0)
    if target.is_dir():
        found = _walk(target)
    elif glob.has_magic(path):
        matches = [Path(match) for match in glob.glob(path, recursive=True)]
        # With ** a folder and the files in it both match; a file counts once.
        found = list(dict.fromkeys(f for m in matches for f in (_walk(m) if m.is_dir() else [m])))
        if not found:
            raise DataError(f"source {name!r}: no file matches {path}", remedy="check the pattern")
    else:
        raise DataError(f"source {name!r}: {path} does not exist", remedy="check the path in the recipe")
    files = sorted((f for f in found if f.suffix.lower() in SUFFIXES), key=lambda f: f.as_posix())
    if not files:
        raise DataError(f"source {name!r}: {path} holds no readable file among {len(found)} files", remedy=supported)
    return SourceFiles(files, len(found) - len(files))


def read_documents(
    source: SourceConfig | ValidationConfig,
    files: list[Path],
    on_bad_record: OnBadRecord,
    counts: ReadCounts,
    quarantine: TextIO | None = None,
) -> Iterator[Document]:
    """Yield the documents of `files` in order, counting into `counts` as they pass.

    A bad record (invalid UTF-8, bad JSON, field missing or not a string, NUL) ends the reading under
    `error`; otherwise it is counted by reason, and under `quarantine` also written to `quarantine`.

    Raises:
        DataError: a bad record under `error`, or a file that cannot be read.
    """
    name = source.name or Path(source.path).stem

    def parse(raw: bytes, is_json: bool) -> str | None:
        text = string_field(json_object(raw), source.text) if is_json else plain_text(raw)
        return None if not text or text.isspace() else text

    for record in read_records(source, files, on_bad_record, counts, parse, quarantine):
        yield Document(record.value, name, record.where)


def read_records(
    source: SourceConfig | ValidationConfig,
    files: list[Path],
    on_bad_record: OnBadRecord,
    counts: ReadCounts,
    parse: Parse[T],
    quarantine: TextIO | None = None,
) -> Iterator[Record[T]]:
    """Yield the records of `files` in order, as `parse` reads them; counting, bad ones and errors as in
    `read_documents`. `parse` raises BadRecord."""
    name = source.name or Path(source.path).stem
    for file in files:
        try:
            for where, raw, is_json in _records(file, counts):
                counts.records += 1
                try:
                    value = parse(raw, is_json)
                except BadRecord as bad:
                    take_bad(bad, where, raw, on_bad_record, counts, quarantine)
                    continue
                if value is None:
                    counts.empty += 1
                    continue
                yield Record(value, where, raw)
        except OSError as error:
            raise DataError(f"source {name!r}: cannot read {file}: {error.strerror or error}") from error


def check_budget(name: str, counts: ReadCounts, budget_fraction: float) -> None:
    """Refuse a source of whose records more than `budget_fraction` were bad.

    Raises:
        DataError: with the counts by reason and the place of the first one.
    """
    if counts.num_bad <= budget_fraction * counts.records:
        return
    reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(counts.bad.items()))
    raise DataError(
        f"source {name!r}: {counts.num_bad} of {counts.records} records are bad ({reasons}), more than "
        f"data.bad_record_budget_fraction {budget_fraction:g}; the first is {counts.first_bad}",
        remedy="repair the records or raise the budget",
    )


def _walk(folder: Path) -> list[Path]:
    files: list[Path] = []
    seen: set[str] = set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:  # a link back to a folder already read
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        files += [Path(parent, n) for n in sorted(names) if not n.startswith(".")]
    return files


def _records(file: Path, counts: ReadCounts) -> Iterator[tuple[str, bytes, bool]]:
    """Yield (where, raw bytes, is jsonl). Lines end at \\n alone, so U+2028 inside a string is harmless."""
    if file.suffix.lower() != ".jsonl":
        yield str(file), file.read_bytes(), False
        return
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            raw = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if raw.isspace() or not raw:
                counts.blank_lines += 1
                continue
            yield f"{file}:{number}", raw, True


def json_object(raw: bytes) -> dict[str, Any]:
    """The object on a line of jsonl.

    Raises:
        BadRecord: invalid UTF-8, bad JSON, or no object.
    """
    try:
        record: Any = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadRecord("invalid_utf8", f"invalid UTF-8 at byte {error.start} of the line") from None
    except (ValueError, RecursionError) as error:
        raise BadRecord("bad_json", f"not valid JSON ({error})") from None
    if not isinstance(record, dict):
        raise BadRecord("bad_json", f"a JSON {type(record).__name__} where an object belongs")
    return record


def field_of(record: dict[str, Any], key: str) -> Any:
    """The value of a field.

    Raises:
        BadRecord: there is none.
    """
    if key not in record:
        raise BadRecord("missing_field", f"no field {key!r}; fields are {sorted(record)[:8]}")
    return record[key]


def string_field(record: dict[str, Any], key: str) -> str:
    """The text of a field.

    Raises:
        BadRecord: it is missing, no string, or holds what no text holds.
    """
    text = field_of(record, key)
    if not isinstance(text, str):
        raise BadRecord("not_a_string", f"field {key!r} is of type {type(text).__name__}")
    return checked(text)


def plain_text(raw: bytes) -> str:
    """The text of a whole file.

    Raises:
        BadRecord: invalid UTF-8, or what no text holds.
    """
    try:
        return checked(raw.removeprefix(b"\xef\xbb\xbf").decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadRecord("invalid_utf8", f"invalid UTF-8 at byte {error.start}") from None


def checked(text: str) -> str:
    """`text`, if it can stand in a UTF-8 file and holds no NUL.

    Raises:
        BadRecord: it cannot.
    """
    if "\x00" in text:
        raise BadRecord("nul", f"a NUL character at {text.index(chr(0))}")
    if not text.isascii():
        try:
            text.encode("utf-8")  # JSON can spell half of a surrogate pair, which no UTF-8 text holds
        except UnicodeEncodeError as error:
            raise BadRecord("invalid_utf8", f"a lone surrogate at character {error.start}") from None
    return text


def take_bad(
    bad: BadRecord,
    where: str,
    raw: bytes,
    on_bad_record: OnBadRecord,
    counts: ReadCounts,
    quarantine: TextIO | None,
) -> None:
    """Do with a bad record what the policy says; `where` and `raw` are its place and bytes.

    Raises:
        DataError: under `error`.
    """
    if on_bad_record == "error":
        raise DataError(
            f"{where}: {bad.detail}",
            remedy="repair it, or set data.on_bad_record to skip or quarantine",
        )
    counts.bad[bad.reason] = counts.bad.get(bad.reason, 0) + 1
    counts.first_bad = counts.first_bad or f"{where}: {bad.detail}"
    if on_bad_record == "quarantine" and quarantine is not None:
        # Bytes that are no UTF-8 become lone surrogates in ASCII JSON: json.loads gives them back exactly.
        record = {
            "where": where,
            "reason": bad.reason,
            "detail": bad.detail,
            "record": raw.decode("utf-8", "surrogateescape"),
        }
        quarantine.write(json.dumps(record) + "\n")
