"""One record of a source as its file has it, and why one cannot be used."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dist_cpt.config.schema import MAX_RECORD_BYTES
from dist_cpt.data.long_text import LongText

Fields = dict[str, Any]


class BadRecord(Exception):
    """One invalid record: `reason` is the key it is counted under, `detail` the message."""

    def __init__(self, reason: str, detail: str) -> None:
        self.reason = reason
        self.detail = detail
        super().__init__(detail)


@dataclass(frozen=True)
class RawRecord:
    """One record as its file holds it. `where` is `file`, `file:line` or `file:row`, counted from 1."""

    where: str
    content: bytes | Fields | np.ndarray | LongText  # a text or a line of JSON, an object, or token ids
    is_text: bool = False
    bad: BadRecord | None = None  # why the record cannot be read

    def fields(self) -> Fields:
        """The record's object; BadRecord if it is a text or not a valid object."""
        if self.bad is not None:
            raise self.bad
        if isinstance(self.content, dict):
            return self.content
        if self.is_text or not isinstance(self.content, bytes):
            raise BadRecord("no_fields", "a file of text or tokens has no fields")
        return json_object(self.content)

    @property
    def raw(self) -> bytes:
        """The bytes to keep of a bad record: those of the file, an object as JSON, or the beginning of a long text."""
        if isinstance(self.content, dict):
            return json.dumps(self.content, default=str).encode()
        if isinstance(self.content, LongText):
            return str(self.content).encode()
        return self.content if isinstance(self.content, bytes) else self.content.tobytes()

    @property
    def num_bytes(self) -> int:
        """About what the record takes in memory."""
        if isinstance(self.content, dict):
            return sum(len(value) for value in self.content.values() if isinstance(value, str | LongText))
        return self.content.nbytes if isinstance(self.content, np.ndarray) else len(self.content)


def json_object(raw: bytes) -> Fields:
    """The object on one line of jsonl; BadRecord if it is not valid UTF-8, not JSON, or not an object."""
    try:
        record: Any = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise not_json(error) from None
    return object_of(record)


def not_json(error: ValueError | RecursionError, *, in_piece: bool = False) -> BadRecord:
    """The reason of a line that is not valid JSON."""
    if isinstance(error, UnicodeDecodeError):  # a piece of a long line does not know where it begins
        place = "in" if in_piece else f"at byte {error.start} of"
        return BadRecord("invalid_utf8", f"invalid UTF-8 {place} the line")
    return BadRecord("bad_json", f"not valid JSON ({error})")


def object_of(value: Any) -> Fields:
    """A parsed JSON value; BadRecord if it is not an object."""
    if not isinstance(value, dict):
        raise BadRecord("bad_json", f"a JSON {type(value).__name__}, not an object")
    return value


Records = Iterator[RawRecord | None]  # None: a blank line


@dataclass(frozen=True)
class Limits:
    """How large a record may be, and where texts too long for memory may be kept; None: every record is in memory."""

    max_record_bytes: int = MAX_RECORD_BYTES
    spool: Path | None = None

    def too_large(self, num_bytes: int) -> BadRecord:
        """The reason of a larger record."""
        return BadRecord("too_large", f"{num_bytes} bytes, more than data.max_record_bytes {self.max_record_bytes}")
