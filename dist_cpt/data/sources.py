"""Files of text -> records: which files a source names, how they are read, and what counts as a bad record."""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, TextIO, TypeVar

from dist_cpt.errors import DataError

SUFFIXES = (".jsonl", ".txt", ".md")
OnBadRecord = Literal["error", "skip", "quarantine"]
T = TypeVar("T")
Parse = Callable[[bytes, bool], T | None]  # (raw bytes, is jsonl) -> the record's value, or None for an empty record


@dataclass(frozen=True)
class SourceFiles:
    """The files of a source in reading order, and the number of files skipped for their suffix."""

    files: list[Path]
    ignored_files: int


@dataclass(frozen=True)
class Record(Generic[T]):
    """One parsed record. `where` is `file:line` for jsonl and `file` otherwise; `raw` are its bytes."""

    value: T
    where: str
    raw: bytes


class BadRecord(Exception):
    """One invalid record: `reason` is the key it is counted under, `detail` the message."""

    def __init__(self, reason: str, detail: str) -> None:
        self.reason = reason
        self.detail = detail
        super().__init__(detail)


@dataclass
class ReadCounts:
    """Counts of one source. `records` are non-blank jsonl lines and whole txt or md files, bad ones included."""

    records: int = 0
    blank_lines: int = 0
    empty: int = 0  # nothing but white space
    bad: dict[str, int] = field(default_factory=dict)  # by reason
    first_bad: str | None = None  # where: detail

    @property
    def num_bad(self) -> int:
        return sum(self.bad.values())


class RecordTally:
    """Counts the records of one source and applies data.on_bad_record to the bad ones."""

    def __init__(self, on_bad_record: OnBadRecord = "error", quarantine: TextIO | None = None) -> None:
        self.counts = ReadCounts()
        self._on_bad_record = on_bad_record
        self._quarantine = quarantine

    def reject(self, bad: BadRecord, where: str, raw: bytes) -> None:
        """Count a bad record and, under `quarantine`, write it down.

        Raises:
            DataError: under `error`.
        """
        if self._on_bad_record == "error":
            raise DataError(
                f"{where}: {bad.detail}", remedy="repair it, or set data.on_bad_record to skip or quarantine"
            )
        self.counts.bad[bad.reason] = self.counts.bad.get(bad.reason, 0) + 1
        self.counts.first_bad = self.counts.first_bad or f"{where}: {bad.detail}"
        if self._quarantine is not None:
            # Invalid UTF-8 becomes lone surrogates in ASCII JSON: json.loads restores the bytes exactly.
            text = raw.decode("utf-8", "surrogateescape")
            record = {"where": where, "reason": bad.reason, "detail": bad.detail, "record": text}
            self._quarantine.write(json.dumps(record) + "\n")


def find_files(path: str, name: str) -> SourceFiles:
    """The files of a source: a file, a folder (recursive, without hidden entries) or a glob pattern; sorted.

    Raises:
        DataError: nothing there, or nothing with a supported suffix.
    """
    target = Path(path)
    supported = f"supported are {', '.join(SUFFIXES)}"
    if target.is_file():
        if target.suffix.lower() not in SUFFIXES:
            raise DataError(f"source {name!r}: {path} has the unknown suffix {target.suffix!r}", remedy=supported)
        return SourceFiles([target], 0)
    if target.is_dir():
        candidates = _walk(target)
    elif glob.has_magic(path):
        matches = [Path(match) for match in glob.glob(path, recursive=True)]
        # ** matches both a folder and the files in it; a file counts once.
        candidates = list(dict.fromkeys(f for m in matches for f in (_walk(m) if m.is_dir() else [m])))
        if not candidates:
            raise DataError(f"source {name!r}: no file matches {path}", remedy="check the pattern")
    else:
        raise DataError(f"source {name!r}: {path} does not exist", remedy="check the path in the recipe")
    files = sorted((f for f in candidates if f.suffix.lower() in SUFFIXES), key=lambda f: f.as_posix())
    if not files:
        raise DataError(f"source {name!r}: {path}: no readable file among {len(candidates)} files", remedy=supported)
    return SourceFiles(files, len(candidates) - len(files))


def read_records(name: str, files: Sequence[Path], parse: Parse[T], tally: RecordTally) -> Iterator[Record[T]]:
    """Yield the records of source `name` in order, counting them and rejecting bad ones in `tally`.

    Raises:
        DataError: a bad record under `error`, or an unreadable file.
    """
    for file in files:
        try:
            for where, raw, is_json in _raw_records(file, tally.counts):
                tally.counts.records += 1
                try:
                    value = parse(raw, is_json)
                except BadRecord as bad:
                    tally.reject(bad, where, raw)
                    continue
                if value is None:
                    tally.counts.empty += 1
                    continue
                yield Record(value, where, raw)
        except OSError as error:
            raise DataError(f"source {name!r}: cannot read {file}: {error.strerror or error}") from error


def check_budget(name: str, counts: ReadCounts, budget_fraction: float) -> None:
    """Refuse a source with more than `budget_fraction` bad records.

    Raises:
        DataError: with the counts by reason and the first bad record.
    """
    if counts.num_bad <= budget_fraction * counts.records:
        return
    reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(counts.bad.items()))
    raise DataError(
        f"source {name!r}: {counts.num_bad} of {counts.records} records are bad ({reasons}), more than "
        f"data.bad_record_budget_fraction {budget_fraction:g}; the first is {counts.first_bad}",
        remedy="repair the records or raise the budget",
    )


def text_parser(field_name: str) -> Parse[str]:
    """Parse plain text: a jsonl field or a whole file."""

    def parse(raw: bytes, is_json: bool) -> str | None:
        text = string_field(json_object(raw), field_name) if is_json else _file_text(raw)
        return None if not text or text.isspace() else text

    return parse


def json_object(raw: bytes) -> dict[str, Any]:
    """The object on one line of jsonl; BadRecord if it is not valid UTF-8, not JSON, or not an object."""
    try:
        record: Any = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadRecord("invalid_utf8", f"invalid UTF-8 at byte {error.start} of the line") from None
    except (ValueError, RecursionError) as error:
        raise BadRecord("bad_json", f"not valid JSON ({error})") from None
    if not isinstance(record, dict):
        raise BadRecord("bad_json", f"a JSON {type(record).__name__}, not an object")
    return record


def field_of(record: dict[str, Any], key: str) -> Any:
    """The value of a field; BadRecord if it is missing."""
    if key not in record:
        raise BadRecord("missing_field", f"no field {key!r}; fields are {sorted(record)[:8]}")
    return record[key]


def string_field(record: dict[str, Any], key: str) -> str:
    """The text of a field; BadRecord if it is missing, not a string, or not valid text."""
    text = field_of(record, key)
    if not isinstance(text, str):
        raise BadRecord("not_a_string", f"field {key!r} is of type {type(text).__name__}")
    return valid_text(text)


def valid_text(text: str) -> str:
    """`text` itself; BadRecord if UTF-8 cannot encode it or it has a NUL."""
    if "\x00" in text:
        raise BadRecord("nul", f"a NUL character at {text.index(chr(0))}")
    if not text.isascii():
        try:
            text.encode("utf-8")  # JSON can spell half a surrogate pair
        except UnicodeEncodeError as error:
            raise BadRecord("invalid_utf8", f"a lone surrogate at character {error.start}") from None
    return text


def _file_text(raw: bytes) -> str:
    try:
        return valid_text(raw.removeprefix(b"\xef\xbb\xbf").decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadRecord("invalid_utf8", f"invalid UTF-8 at byte {error.start}") from None


def _raw_records(file: Path, counts: ReadCounts) -> Iterator[tuple[str, bytes, bool]]:
    """Yield (where, raw bytes, is jsonl). Lines end at \\n only: U+2028 may occur inside a string."""
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


def _walk(folder: Path) -> list[Path]:
    files: list[Path] = []
    visited: set[str] = set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        if real in visited:  # a symbolic link back to a folder already read
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        files += [Path(parent, n) for n in sorted(names) if not n.startswith(".")]
    return files
