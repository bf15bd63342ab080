"""Records of text files: whole texts, lines of JSON, JSON arrays and CSV."""

from __future__ import annotations

import csv
import io
import json
from pathlib import PurePosixPath
from typing import Any, BinaryIO

from dist_cpt.data.long_text import LONG_BYTES, LongLine, TextSpool
from dist_cpt.data.records import BadRecord, Limits, RawRecord, Records, not_json, object_of

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
READ_BYTES = 1 << 20


def read_text(stream: BinaryIO, where: str, limits: Limits) -> Records:
    """The whole file, which is not held in memory if it is long and there is a place for it."""
    pieces, num_bytes = [], 0
    spool: TextSpool | None = None
    while (block := stream.read(READ_BYTES)) and num_bytes <= limits.max_record_bytes:
        num_bytes += len(block)
        pieces.append(block)
        if spool is None and limits.spool is not None and num_bytes > LONG_BYTES:
            spool, pieces[0] = TextSpool(limits.spool), pieces[0].removeprefix(BYTE_ORDER_MARK)
        while spool is not None and pieces:
            spool.write_bytes(pieces.pop(0))
    if num_bytes > limits.max_record_bytes:
        yield RawRecord(where, b"".join(pieces), is_text=True, bad=limits.too_large(num_bytes))
    elif spool is None:
        yield RawRecord(where, b"".join(pieces), is_text=True)
    else:
        spool.write_bytes(b"", last=True)
        yield RawRecord(where, spool.finish(), is_text=True)


def read_lines(stream: BinaryIO, where: str, limits: Limits, at: int = 0, end: int | None = None) -> Records:
    """One object per line that starts before `end`. Lines end at \\n only: U+2028 may occur inside a string."""
    is_start, number = at == 0, 0
    while (end is None or at < end) and (line := stream.readline(LONG_BYTES)):
        number, at = number + 1, at + len(line)
        place = f"{where}:{number}"
        raw = line.removeprefix(BYTE_ORDER_MARK) if number == 1 and is_start else line
        if len(line) == LONG_BYTES and not line.endswith(b"\n"):
            record, num_bytes = _long_line(raw, stream, place, limits)
            at += num_bytes
            yield record
        elif len(line) > limits.max_record_bytes:
            yield RawRecord(place, line, bad=limits.too_large(len(line)))
        else:
            yield RawRecord(place, raw) if raw and not raw.isspace() else None


def _long_line(line: bytes, stream: BinaryIO, where: str, limits: Limits) -> tuple[RawRecord, int]:
    """The record of a line that begins with `line`, and the number of bytes that follow."""
    kept, reader = [line], None if limits.spool is None else LongLine(limits.spool)
    num_bytes, bad, piece = len(line), None, line
    while piece:
        if num_bytes > limits.max_record_bytes:
            kept.clear()
        elif reader is not None and bad is None:
            try:
                reader.feed(kept.pop())
            except ValueError as error:
                bad = not_json(error, in_piece=True)
        piece = b"" if piece.endswith(b"\n") else stream.readline(READ_BYTES)
        num_bytes += len(piece)
        if piece and num_bytes <= limits.max_record_bytes and bad is None:
            kept.append(piece)
    more = num_bytes - len(line)
    if num_bytes > limits.max_record_bytes:
        return RawRecord(where, b"", bad=limits.too_large(num_bytes)), more
    if reader is None:
        return RawRecord(where, b"".join(kept)), more
    try:
        return RawRecord(where, b"" if bad else object_of(reader.finish()), bad=bad), more
    except BadRecord as error:
        bad = error
    except (ValueError, RecursionError) as error:
        bad = not_json(error, in_piece=True)
    return RawRecord(where, b"", bad=bad), more


def lines_from(stream: BinaryIO, where: str, limits: Limits, start: int, end: int) -> Records:
    """The lines that start in bytes [start, end)."""
    at = max(start - 1, 0)
    stream.seek(at)
    while start and at < end:  # the rest of a line that starts earlier, which may be longer than this part
        piece = stream.readline(READ_BYTES)
        at += len(piece)
        if not piece or piece.endswith(b"\n"):
            break
    yield from read_lines(stream, where, limits, at, end)


def read_json(stream: BinaryIO, where: str, limits: Limits) -> Records:
    """One array of objects, or one object per line."""
    head = stream.read(READ_BYTES)
    start = head.removeprefix(BYTE_ORDER_MARK).lstrip()
    if not start.startswith(b"["):
        yield from read_lines(io.BufferedReader(_Behind(head, stream)), where, limits)
        return
    reader = io.TextIOWrapper(io.BufferedReader(_Behind(start[1:], stream)), encoding="utf-8")
    decoder, text, number = json.JSONDecoder(), "", 0
    while True:
        text = text.lstrip(" \t\r\n" + ("," if number else ""))
        if text.startswith("]"):
            return
        try:
            value, end = decoder.raw_decode(text)
        except ValueError as error:
            if len(text) > limits.max_record_bytes:
                raise limits.too_large(len(text)) from None
            more = reader.read(max(READ_BYTES, len(text)))
            if not more:
                raise BadRecord("bad_json", f"not valid JSON after element {number} of the array ({error})") from None
            text += more
            continue
        number += 1
        text = text[end:]
        # Anything but an object becomes the bad record that it would be on a line of its own.
        content = value if isinstance(value, dict) else json.dumps(value).encode()
        yield RawRecord(f"{where}:{number}", content)


class _Behind(io.RawIOBase):
    """A stream with bytes that were already read put back before the rest."""

    def __init__(self, head: bytes, rest: BinaryIO) -> None:
        self._head, self._rest = memoryview(head), rest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._head[: len(buffer)] if self._head else self._rest.read(len(buffer))
        self._head = self._head[len(data) :]
        buffer[: len(data)] = data
        return len(data)


def read_csv(stream: BinaryIO, where: str, limits: Limits) -> Records:
    """One object per row, named by the first row; a file that ends in .tsv has tabs."""
    csv.field_size_limit(2**31 - 1)  # the default refuses documents above 128 KiB
    lines = (line.decode("utf-8", "surrogateescape") for line in stream)  # a bad byte spoils its record only
    reader = csv.reader(lines, delimiter="\t" if ".tsv" in PurePosixPath(where).suffixes else ",", strict=True)
    header = [name.removeprefix("\ufeff") for name in next(reader, [])]
    if len(set(header)) != len(header):
        raise BadRecord("damaged_file", f"two columns have one name: {header[:8]}")
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:  # the next row is read afresh
            yield RawRecord(f"{where}:{reader.line_num}", b"", bad=BadRecord("bad_csv", str(error)))
            continue
        if not row:
            yield None
        elif len(row) == len(header):
            yield RawRecord(f"{where}:{reader.line_num}", dict(zip(header, row, strict=True)))
        else:
            bad = BadRecord("wrong_columns", f"{len(row)} values for {len(header)} columns")
            yield RawRecord(f"{where}:{reader.line_num}", json.dumps(row).encode(), bad=bad)
