"""Texts too long for memory: kept in a file without a name, checked as they are written, and read in parts."""

from __future__ import annotations

import codecs
import json
import re
import secrets
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

LONG_BYTES = 8 * 2**20  # of a text file or a line, from which it is not held in memory
_LONG_STRING_BYTES = 1 << 20  # of a string inside such a line
_READ_BYTES = 1 << 20
_SHOWN_CHARACTERS = 1 << 16
_IN_STRING = re.compile(rb'(?:[^"\\]++|\\.)*+', re.DOTALL)
# Escapes that are complete: a high surrogate needs what follows it.
_WHOLE_ESCAPES = re.compile(
    r"(?:[^\\]++|\\[^u]|\\u(?![dD][89abAB])[0-9a-fA-F]{4}"
    r"|\\u[dD][89abAB][0-9a-fA-F]{2}(?:\\u[0-9a-fA-F]{4}|(?=[^\\]|\\[^u])))*+",
    re.DOTALL,
)
_LONGEST_ESCAPE = 12  # characters of a surrogate pair


class LongText:
    """A text in a file that is deleted with this object. `problem` says why the text is not valid."""

    def __init__(self, file: IO[bytes], num_bytes: int, problem: tuple[str, str] | None, is_blank: bool) -> None:
        self.problem, self._file, self._num_bytes, self._is_blank = problem, file, num_bytes, is_blank
        weakref.finalize(self, file.close)

    def __len__(self) -> int:
        """Bytes of UTF-8."""
        return self._num_bytes

    def __str__(self) -> str:
        """The beginning."""
        return next(self.parts(), "")[:_SHOWN_CHARACTERS]

    def isspace(self) -> bool:
        return self._is_blank

    def parts(self) -> Iterator[str]:
        """The text, about a million characters at a time."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._file.seek(0)
        while block := self._file.read(_READ_BYTES):
            yield decoder.decode(block)


class TextSpool:
    """Writes a LongText."""

    def __init__(self, folder: Path) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        self._closes = weakref.finalize(self, self._file.close)
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._num_bytes = self._num_characters = 0
        self._problem: tuple[str, str] | None = None
        self._is_blank = True

    def write(self, text: str) -> None:
        """Add text, and check it."""
        if self._problem is None:
            if "\x00" in text:
                self._problem = ("nul", f"a NUL character at {self._num_characters + text.index(chr(0))}")
            try:
                content = text.encode("utf-8")
            except UnicodeEncodeError as error:
                self._problem = ("invalid_utf8", f"a lone surrogate at character {self._num_characters + error.start}")
                content = text.encode("utf-8", "replace")
            self._is_blank &= not text or text.isspace()
            self._file.write(content)
            self._num_bytes += len(content)
            self._num_characters += len(text)

    def write_bytes(self, data: bytes, *, last: bool = False) -> None:
        """Add UTF-8; a character may continue in the next call."""
        try:
            self.write(self._decoder.decode(data, last))
        except UnicodeDecodeError as error:
            self._problem = self._problem or (
                "invalid_utf8",
                f"invalid UTF-8 near byte {self._num_bytes + error.start}",
            )

    def finish(self) -> LongText:
        """The text."""
        self._file.flush()
        self._closes.detach()
        return LongText(self._file, self._num_bytes, self._problem, self._is_blank)


class LongLine:
    """A line of JSON that comes in pieces: its long strings go to files, the rest is parsed as usual."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._mark = folder, secrets.token_hex(16)
        self._rest, self._short = bytearray(), bytearray()  # all but long strings; the string that is read
        self._is_inside, self._carry = False, b""
        self._string: _StringSpool | None = None
        self._texts: list[LongText] = []

    def feed(self, data: bytes) -> None:
        """Add bytes.

        Raises:
            ValueError: they cannot be part of valid JSON.
        """
        data, at = self._carry + data, 0
        self._carry = b""
        while at < len(data):
            if not self._is_inside:
                quote = data.find(b'"', at)
                end = len(data) if quote < 0 else quote + 1
                self._rest += data[at:end]
                at, self._is_inside = end, quote >= 0
                continue
            found = _IN_STRING.match(data, at)
            assert found is not None  # it matches nothing, if need be
            self._take(data[at : found.end()])
            at = found.end()
            if data[at : at + 1] == b'"':
                self._close_string()
                at += 1
            else:  # the first half of an escape, or nothing
                self._carry, at = data[at:], len(data)

    def finish(self) -> Any:
        """The value, with a LongText in place of every long string.

        Raises:
            ValueError: it is not valid JSON.
            RecursionError: it is nested too deep.
        """
        if self._string is not None:
            raise ValueError("the line ends inside a string")
        return self._with_texts(json.loads(self._rest.decode("utf-8")))

    def _take(self, raw: bytes) -> None:
        if self._string is None:
            self._short += raw
            if len(self._short) <= _LONG_STRING_BYTES:
                return
            self._string, raw = _StringSpool(self._folder), bytes(self._short)
            self._short.clear()
        self._string.feed(raw)

    def _close_string(self) -> None:
        if self._string is None:
            self._rest += self._short
        else:
            self._rest += f"{self._mark}{len(self._texts)}".encode()
            self._texts.append(self._string.finish())
        self._rest += b'"'
        self._short.clear()
        self._string, self._is_inside = None, False

    def _with_texts(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {key: self._with_texts(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self._with_texts(item) for item in value]
        if isinstance(value, str) and value.startswith(self._mark):
            return self._texts[int(value.removeprefix(self._mark))]
        return value


class _StringSpool:
    """The inside of a JSON string, unescaped as it comes."""

    def __init__(self, folder: Path) -> None:
        self.spool = TextSpool(folder)
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._pending = ""

    def feed(self, raw: bytes) -> None:
        self._pending += self._decoder.decode(raw)
        found = _WHOLE_ESCAPES.match(self._pending)
        assert found is not None
        self.spool.write(json.loads(f'"{found[0]}"'))
        self._pending = self._pending[found.end() :]
        if len(self._pending) > _LONGEST_ESCAPE:
            raise ValueError(f"invalid escape {self._pending[:_LONGEST_ESCAPE]!r}")

    def finish(self) -> LongText:
        self._pending += self._decoder.decode(b"", True)
        self.spool.write(json.loads(f'"{self._pending}"'))
        return self.spool.finish()
