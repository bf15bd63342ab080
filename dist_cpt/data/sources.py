"""Files of text -> records: which files a source names, how they are read, and what counts as a bad record."""

from __future__ import annotations

import fnmatch
import glob
import json
import os
import re
import stat
import string
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, Literal, TextIO, TypeVar

from dist_cpt.config.schema import MAX_RECORD_BYTES, TextConfig
from dist_cpt.data.columnar import is_dataset_folder
from dist_cpt.data.containers import FORMATS, Part, is_ignored, read_container, suffix_of
from dist_cpt.data.filters import keeps
from dist_cpt.data.hub import HubDataset, dataset_of, is_on_hub
from dist_cpt.data.long_text import LongText
from dist_cpt.data.records import BadRecord, Fields, Limits, RawRecord
from dist_cpt.errors import DataError, StorageError
from dist_cpt.storage import ANSWERS, patiently

OnBadRecord = Literal["error", "skip", "quarantine"]
T = TypeVar("T")
Parse = Callable[[RawRecord], T | None]  # the record's value, or None for an empty record
_NAMED = 5  # files in a message
COUNTED_FILES, OTHER_FILES = 100, "other files"


class NoFiles(DataError):
    """There is nothing at a source's path, or not any more."""


@dataclass(frozen=True)
class SourceFiles:
    """The files of a source in reading order, with the settings that decide how they are read."""

    files: list[Path | HubDataset]  # folders are data sets that `datasets` saved
    ignored_files: int = 0
    ignore: tuple[str, ...] = ()  # patterns, for the members of archives too
    split: str | None = None  # of saved data sets
    filter: str | None = None  # the function that keeps records
    max_record_bytes: int = MAX_RECORD_BYTES


@dataclass(frozen=True)
class Record(Generic[T]):
    """One parsed record and where it comes from."""

    value: T
    origin: RawRecord


@dataclass
class ReadCounts:
    """Counts of one source. `records` are non-blank lines, rows, and whole txt or md files, bad ones included."""

    records: int = 0
    blank_lines: int = 0
    empty: int = 0  # nothing but white space
    filtered: int = 0  # not kept by the source's filter
    bad: dict[str, int] = field(default_factory=dict)  # by reason
    bad_by_file: dict[str, dict[str, int]] = field(default_factory=dict)  # by reason; of the first files with any
    first_bad: str | None = None  # where: detail

    @property
    def num_bad(self) -> int:
        return sum(self.bad.values())

    def add_bad(self, file: str, reason: str, number: int = 1) -> None:
        """Count bad records of a file; those beyond `COUNTED_FILES` files together."""
        self.bad[reason] = self.bad.get(reason, 0) + number
        known = file in self.bad_by_file or len(self.bad_by_file) < COUNTED_FILES
        by_reason = self.bad_by_file.setdefault(file if known else OTHER_FILES, {})
        by_reason[reason] = by_reason.get(reason, 0) + number


class RecordTally:
    """Counts the records of one source and applies data.on_bad_record to the bad ones, each at `place(where)`."""

    def __init__(
        self,
        on_bad_record: OnBadRecord = "error",
        quarantine: TextIO | None = None,
        place: Callable[[str], str] = str,
    ) -> None:
        self.counts = ReadCounts()
        self._on_bad_record = on_bad_record
        self._quarantine = quarantine
        self._place = place

    def reject(self, bad: BadRecord, origin: RawRecord) -> None:
        """Count a bad record and, under `quarantine`, write it down.

        Raises:
            DataError: under `error`.
        """
        where = self._place(origin.where)
        if self._on_bad_record == "error":
            raise DataError(
                f"{where}: {bad.detail}", remedy="repair it, or set data.on_bad_record to skip or quarantine"
            )
        self.counts.add_bad(re.sub(r":\d+$", "", origin.where), bad.reason)
        self.counts.first_bad = self.counts.first_bad or f"{where}: {bad.detail}"
        if self._quarantine is not None:
            # Invalid UTF-8 becomes lone surrogates in ASCII JSON: json.loads restores the bytes exactly.
            text = origin.raw.decode("utf-8", "surrogateescape")
            record = {"where": where, "reason": bad.reason, "detail": bad.detail, "record": text}
            self._quarantine.write(json.dumps(record) + "\n")


def source_files(source: TextConfig, name: str) -> SourceFiles:
    """What the source `name` of a resolved recipe reads, and how.

    Raises:
        DataError: as `find_files`.
    """
    if is_on_hub(source):
        return SourceFiles([dataset_of(source)], filter=source.filter)
    return replace(find_files(source.place, name, source.ignore, source.split), filter=source.filter)


def find_files(path: str, name: str, ignore: Sequence[str] = (), split: str | None = None) -> SourceFiles:
    """The files of a source: a file, a folder (recursive, without hidden entries) or a glob pattern; sorted.

    Patterns of `ignore` match a file's name, or its path inside the folder.

    Raises:
        DataError: nothing there, or a file that is not read and that `ignore` does not name.
        StorageError: the file system does not answer.
    """
    return patiently(path, lambda: _find_files(path, name, ignore, split))


def _find_files(path: str, name: str, ignore: Sequence[str], split: str | None) -> SourceFiles:
    target = Path(path)
    mode = _mode(target)
    if mode is not None and not stat.S_ISDIR(mode):
        root, candidates = target.parent, [target]
    elif mode is not None:
        root, candidates = target, _walk(target)
    elif glob.has_magic(path):
        matches = list(_matches(Path(target.anchor), target.parts[bool(target.anchor) :]))
        # ** matches both a folder and the files in it; a file counts once.
        candidates = list(dict.fromkeys(f for m in matches for f in (_walk(m) if stat.S_ISDIR(_mode(m) or 0) else [m])))
        root = Path(os.path.commonpath(candidates)) if candidates else target
        if not candidates:
            raise NoFiles(f"source {name!r}: no file matches {path}", remedy="check the pattern")
    else:
        raise NoFiles(f"source {name!r}: {path} does not exist", remedy="check the path in the recipe")
    wanted = [f for f in candidates if not is_ignored(Path(os.path.relpath(f, root)).as_posix(), ignore)]
    # Token files of Megatron-LM come in pairs; the index stands for both.
    files = {f.with_suffix(".idx") if f.suffix == ".bin" and _mode(f.with_suffix(".idx")) else f for f in wanted}
    modes = {f: _mode(f) or 0 for f in files}
    irregular = sorted(f.as_posix() for f, m in modes.items() if m and not (stat.S_ISREG(m) or stat.S_ISDIR(m)))
    if irregular:
        raise DataError(
            f"source {name!r}: {irregular[0]} is not a regular file", remedy="remove it, or name it in ignore"
        )
    unread = sorted(f.as_posix() for f, mode in modes.items() if not (suffix_of(f.name) or stat.S_ISDIR(mode)))
    if unread:
        listed = ", ".join(unread[:_NAMED]) + (f" and {len(unread) - _NAMED} more" if len(unread) > _NAMED else "")
        raise DataError(
            f"source {name!r}: {listed}: not a format that is read",
            remedy=f"name it in the source's ignore (a pattern such as '*.png'); read are {FORMATS}",
        )
    if not files:
        raise DataError(
            f"source {name!r}: {path}: no file among {len(candidates)} that ignore does not name",
            remedy="check the path and ignore",
        )
    ordered = sorted(files, key=lambda f: f.as_posix())
    return SourceFiles([*ordered], len(candidates) - len(wanted), tuple(ignore), split)


def read_records(
    name: str,
    files: SourceFiles,
    parse: Parse[T],
    tally: RecordTally,
    parts: Sequence[Part] | None = None,
    spool: Path | None = None,
) -> Iterator[Record[T]]:
    """Yield the records of source `name`, or of some parts of its files, in order; count them, and reject bad ones in
    `tally`. Long texts are kept in the folder `spool`, if it is given, and not in memory.

    Raises:
        DataError: a bad record under `error`, or a name that is no readable file.
        StorageError: the file system does not answer.
    """
    limits = Limits(files.max_record_bytes, None if files.filter is not None else spool)
    for part in [Part(file) for file in files.files] if parts is None else parts:
        file = part.path
        try:
            for raw in read_container(part, files.ignore, files.split, limits):
                if raw is None:
                    tally.counts.blank_lines += 1
                    continue
                tally.counts.records += 1
                try:
                    if raw.num_bytes > files.max_record_bytes:
                        raise limits.too_large(raw.num_bytes)
                    if files.filter is not None and not keeps(files.filter, _filter_record(raw), raw.where):
                        tally.counts.filtered += 1
                        continue
                    value = parse(raw)
                except BadRecord as bad:
                    tally.reject(bad, raw)
                    continue
                if value is None:
                    tally.counts.empty += 1
                    continue
                yield Record(value, raw)
        except OSError as error:
            if error.errno not in ANSWERS:
                raise StorageError(file, error) from error
            raise DataError(f"source {name!r}: cannot read {file}: {error.strerror or error}") from error


def _filter_record(raw: RawRecord) -> Fields:
    """A record as a filter gets it; a text file has one field, `text`."""
    return {"text": _file_text(raw)} if raw.is_text else raw.fields()


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


def is_template(text: str) -> bool:
    """Whether `text` is a template, not a field or a dotted path."""
    return "{" in text


def text_parser(text: str) -> Parse[str | LongText]:
    """Parse plain text: a whole file, or of an object the field, dotted path or template `text`."""

    def parse(raw: RawRecord) -> str | LongText | None:
        found = _file_text(raw) if raw.is_text else _long_text_of(raw, text) or text_of(raw.fields(), text)
        return None if not found or found.isspace() else found

    return parse


def text_of(record: Fields, text: str) -> str:
    """The text of a record: one field, or a template such as `{title}\n\n{body}`; BadRecord as `string_field`."""
    if not is_template(text):
        return string_field(record, text)
    pieces = string.Formatter().parse(text)
    return "".join(literal + ("" if name is None else string_field(record, name)) for literal, name, _, _ in pieces)


def field_of(record: Fields, key: str) -> Any:
    """The value of a field, or at a dotted path such as `meta.text`; BadRecord if it is missing."""
    value: Any = record
    for part in [key] if key in record else key.split("."):
        if not isinstance(value, dict) or part not in value:
            raise BadRecord("missing_field", f"no field {key!r}; fields are {sorted(map(str, record))[:8]}")
        value = value[part]
    return value


def string_field(record: Fields, key: str) -> str:
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


def _long_text_of(raw: RawRecord, text: str) -> LongText | None:
    """The text of a record that was too long to be read as others; None: it was not, or another field is long."""
    if raw.bad is not None or not isinstance(raw.content, dict) or is_template(text):
        return None
    value = field_of(raw.content, text)
    return _valid_long_text(value) if isinstance(value, LongText) else None


def _valid_long_text(text: LongText) -> LongText:
    if text.problem is not None:
        raise BadRecord(*text.problem)
    return text


def _file_text(raw: RawRecord) -> str | LongText:
    if raw.bad is not None:
        raise raw.bad
    if isinstance(raw.content, LongText):
        return _valid_long_text(raw.content)
    assert isinstance(raw.content, bytes)
    try:
        return valid_text(raw.content.removeprefix(b"\xef\xbb\xbf").decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadRecord("invalid_utf8", f"invalid UTF-8 at byte {error.start}") from None


def _mode(path: Path) -> int | None:
    """What kind of file a path or link leads to; None if to nothing."""
    try:
        return path.stat().st_mode
    except OSError as error:
        if error.errno not in ANSWERS:
            raise
        return None


def _matches(folder: Path, parts: Sequence[str], above: frozenset[str] = frozenset()) -> Iterator[Path]:
    """As `glob.glob(recursive=True)`, which takes a folder that cannot be listed for an empty one."""
    if not parts:
        yield folder
        return
    head, rest = parts[0], parts[1:]
    if not glob.has_magic(head):
        if _mode(folder / head) is not None:
            yield from _matches(folder / head, rest)
        return
    if head == "**":
        above |= {os.path.realpath(folder)}
        yield from _matches(folder, rest)
    names = sorted(os.listdir(folder))
    for name in names if head == "**" else fnmatch.filter(names, head):
        child, is_folder = folder / name, stat.S_ISDIR(_mode(folder / name) or 0)
        if name.startswith(".") and not head.startswith("."):
            continue
        if head == "**" and is_folder and os.path.realpath(child) not in above:
            yield from _matches(child, parts, above)
        elif head != "**" and (is_folder or not rest):
            yield from _matches(child, rest)


def _walk(folder: Path) -> list[Path]:
    """The files in a folder, and the folders in it that are saved data sets."""
    files: list[Path] = []
    visited: set[str] = set()

    def fail(error: OSError) -> None:
        raise error

    for parent, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        real = os.path.realpath(parent)
        if real in visited:  # a symbolic link back to a folder already read
            folders.clear()
            continue
        visited.add(real)
        if is_dataset_folder(Path(parent)):
            folders.clear()
            files.append(Path(parent))
            continue
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        files += [Path(parent, n) for n in sorted(names) if not n.startswith(".")]
    return files
