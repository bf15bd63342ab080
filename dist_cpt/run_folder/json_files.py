"""JSON as a run writes and reads it: objects replaced whole, rows appended one per line.

A resume depends on the strict readers, which raise on damage; `read_object` and `read_complete_rows` skip what cannot
be parsed, for status and report. An errno is never taken for damage.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import math
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dist_cpt.errors import DataError, WriteError
from dist_cpt.storage import patiently, read_bytes


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if the file is absent or contains anything else.

    Raises:
        StorageError: the file system does not answer.
    """
    try:
        content = json.loads(read_bytes(path))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def glance(path: Path) -> dict[str, Any]:
    """As `read_object`, at once: also empty while the file cannot be read. For those who must not wait."""
    with contextlib.suppress(OSError, ValueError):
        content = json.loads(path.read_bytes())
        return content if isinstance(content, dict) else {}
    return {}


def write_object(path: Path, value: Any) -> None:
    """Replace a JSON file: after a crash it has the old content or the new one.

    Raises:
        WriteError: the file cannot be written.
    """
    replace_file(path, json_bytes(value))


def json_bytes(value: Any) -> bytes:
    """As JSON files of a run are laid out."""
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()


def replace_file(path: Path, content: bytes) -> None:
    """Replace a file and force it to the disk: after a crash it has the old content or the new one.

    Raises:
        WriteError: the file cannot be written.
    """

    def replace() -> None:
        temporary = write_temporary(path, content)
        try:
            os.replace(temporary, path)
            fsync_path(path.parent)
        except OSError as error:
            remove_quietly(temporary)
            raise cannot_write(path, error) from error

    patiently(path, replace)


def write_temporary(path: Path, content: bytes) -> Path:
    """Write a file beside `path` that no other writer uses, and force it to the disk.

    Raises:
        WriteError: the file cannot be written.
    """
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        remove_quietly(temporary)
        raise cannot_write(path, error) from error
    return temporary


def remove_quietly(path: Path) -> None:
    """Remove a temporary file; the next claim of the folder removes one that stays."""
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)


def swap_in(temporary: Path, path: Path) -> Callable[[], None]:
    """Rename `temporary` to `path`; returns what takes that back, unless another file has come there since.

    Where two names can be exchanged, `temporary` is the earlier file afterwards; elsewhere there is no way back.
    """
    mine = temporary.stat()

    def still_there() -> bool:
        return path.exists() and os.path.samestat(path.stat(), mine)

    def exchange_again() -> None:
        if still_there():
            _rename(temporary, path, _EXCHANGE)

    def remove() -> None:
        if still_there():
            path.unlink()

    def no_way_back() -> None:
        return

    if _rename(temporary, path, _EXCHANGE):
        undo = exchange_again
    elif _rename(temporary, path, _NO_REPLACE):
        undo = remove
    else:
        os.replace(temporary, path)
        undo = no_way_back
    fsync_path(path.parent)
    return undo


def is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file still has this name.

    Raises:
        OSError: as from the file system, ENOENT aside.
    """
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


_NO_REPLACE, _EXCHANGE = 1, 2  # Source: renameat2(2), Linux; not on NFS


def _rename(source: Path, target: Path, flag: int) -> bool:
    """Rename without replacing a file, or exchange two; False where there is one or none, or no such call."""
    try:
        rename = ctypes.CDLL(None).renameat2
    except AttributeError:
        return False
    return rename(-100, os.fsencode(source), -100, os.fsencode(target), flag) == 0


def fsync_path(path: Path) -> None:
    """Force a file, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that cannot sync a folder
            raise
    finally:
        os.close(descriptor)


def cannot_write(path: Path, error: OSError) -> WriteError:
    """The error for a file of a run that the file system refused to write."""
    return WriteError(
        f"{path} cannot be written: {error.strerror}",
        remedy="free space or restore the folder, then resume; earlier checkpoints are untouched",
    )


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a .jsonl file of a run, in order; none if the file is absent, without a torn last line.

    Raises:
        DataError: not a file, or a line other than the last is not a JSON object.
        StorageError: the file system does not answer.
    """
    try:
        lines = read_bytes(path).splitlines(keepends=True)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        row = parse_row(line)
        if row is not None:
            rows.append(row)
        elif number < len(lines):
            raise DataError(f"{path}, line {number}: not a JSON object", remedy="the file was edited or damaged")
    return rows


def read_complete_rows(
    path: Path, tail_bytes: int | None = None, *, ended: bool = False
) -> tuple[list[dict[str, Any]], list[int]]:
    """(rows, numbers of unreadable lines) of a .jsonl file that another process may be appending to.

    A last line without its newline is still being written and left out, unless the writer has `ended`. With
    `tail_bytes` only the end of the file is read, without the line that this cuts, and lines are counted from there.

    Raises:
        OSError: the file cannot be read; an absent one has no rows.
    """
    try:
        with path.open("rb") as file:
            start = 0 if tail_bytes is None else max(file.seek(0, os.SEEK_END) - tail_bytes, 0)
            file.seek(start)
            lines = file.read().split(b"\n")[bool(start) : None if ended else -1]
    except FileNotFoundError:
        return [], []
    parsed = [(number, parse_row(line)) for number, line in enumerate(lines, start=1) if line.strip()]
    return [row for _, row in parsed if row is not None], [number for number, row in parsed if row is None]


def rows_or_problem(
    path: Path, problems: list[str], tail_bytes: int | None = None, *, ended: bool = False
) -> list[dict[str, Any]]:
    """As `read_complete_rows`; what cannot be read is appended to `problems`."""
    try:
        rows, unreadable = read_complete_rows(path, tail_bytes, ended=ended)
    except OSError as error:
        problems.append(f"{path.name}: {error.strerror}")
        return []
    if unreadable:
        problems.append(f"{path.name}: line {', '.join(map(str, unreadable[:5]))} cannot be read")
    return rows


def parse_row(line: bytes) -> dict[str, Any] | None:
    """The object of one line; None if it is anything else, such as a torn line."""
    try:
        row = json.loads(line)
    except ValueError:  # covers bytes that are not UTF-8
        return None
    return row if isinstance(row, dict) else None


def encode_row(row: dict[str, Any]) -> bytes:
    """One line of valid JSON; a non-finite number becomes null and is named under `non_finite`."""
    non_finite: dict[str, str] = {}
    clean = {key: _finite(value, key, non_finite) for key, value in row.items()}
    if non_finite:
        clean["non_finite"] = non_finite
    return json.dumps(clean, allow_nan=False, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


def strict_json(raw: bytes) -> Any:
    """Parsed JSON whose numbers are all finite; Python's own reader accepts NaN, Infinity and 1e999.

    Raises:
        ValueError: not JSON, or a number that is not finite.
    """

    def finite(text: str) -> float:
        if not math.isfinite(value := float(text)):
            raise ValueError(f"{text} is not a finite number")
        return value

    return json.loads(raw, parse_constant=finite, parse_float=finite)


def canonical_json(value: Any) -> bytes:
    """JSON with sorted keys and one layout, so that equal values are equal bytes."""
    return json.dumps(value, indent=1, sort_keys=True, allow_nan=False).encode() + b"\n"


def _finite(value: Any, key: str, non_finite: dict[str, str]) -> Any:
    if isinstance(value, dict):
        return {str(k): _finite(v, f"{key}.{k}", non_finite) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v, f"{key}.{i}", non_finite) for i, v in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        non_finite[key] = str(value)  # nan, inf or -inf
        return None
    return value
