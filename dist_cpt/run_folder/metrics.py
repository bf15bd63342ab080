"""metrics.jsonl, evaluations.jsonl and events.jsonl: what the report, `status` and `verify` read.

A line is a JSON object, appended with one system call: a killed process leaves at most one torn line, at the end,
which the next start repairs. Every attempt begins with files of its own, copies of the earlier ones up to its first
step: what an overtaken attempt still appends goes to the file that it has open, which has no name any more.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dist_cpt.errors import StorageError, WriteError
from dist_cpt.run_folder.claim import Claim
from dist_cpt.run_folder.json_files import cannot_write, encode_row, is_at, parse_row
from dist_cpt.run_folder.names import EVALUATIONS, EVENTS, METRICS, rewound_name
from dist_cpt.run_folder.records import CheckpointRecord, EvaluationRecord, RunEnd, RunStart, StepRecord
from dist_cpt.storage import is_there, read_bytes

# keys of a step, absent where they are not known
OPTIONAL = ("epochs_by_source", "attention_max_over_mean", "mfu", "memory_bytes", "experts")


class MetricsFile:
    """Observer that appends every record of a run to its folder.

    A line that the file system refuses (full disk, lost mount) waits, and all later ones behind it.

    Raises:
        Superseded: from every method, when a later attempt has claimed the folder.
        WriteError: when lines have waited for `patience_seconds`.
    """

    def __init__(self, claim: Claim, patience_seconds: float = 0.0) -> None:
        self._claim = claim
        self._patience_seconds = patience_seconds
        self._waiting: deque[tuple[str, bytes]] = deque()
        self._refused_since: float | None = None
        self._open: dict[str, int] = {}

    def on_start(self, start: RunStart) -> None:
        self._event(
            "start" if start.resumed_from is None else "resume",
            name=start.config.name,
            attempt=start.attempt,
            engine=start.engine,
            world_size=start.world_size,
            device=start.device,
            num_steps=start.num_steps,
            first_step=start.first_step,
            resumed_from=start.resumed_from,
            wandb_run_id=start.wandb_run_id,
            sources=[asdict(source) for source in start.sources],
        )

    def on_step(self, record: StepRecord) -> None:
        row = asdict(record)
        self._append(METRICS, {key: row[key] for key in row if row[key] is not None or key not in OPTIONAL})

    def on_evaluation(self, record: EvaluationRecord) -> None:
        row = asdict(record)
        scores = row.pop("scores")
        self._append(EVALUATIONS, row | scores)

    def on_checkpoint(self, record: CheckpointRecord) -> None:
        self._event("checkpoint", **asdict(record))

    def on_message(self, text: str) -> None:
        self._event("message", text=text)

    def on_end(self, end: RunEnd) -> None:
        self._event("end", **asdict(end))
        self.sync()
        self.close()

    def sync(self) -> None:
        """Force all lines to the disk, including those that wait.

        Raises:
            WriteError: the file system refuses, however short they have waited.
        """
        while self._waiting:
            self._write_first()
        for name, descriptor in self._open.items():
            _or_write_error(self._claim.folder / name, lambda descriptor=descriptor: os.fsync(descriptor))

    def rewind(self, step: int) -> int:
        """Begin files of this attempt's own; rows after `step` go to the *.rewound.jsonl files. Returns their number.

        For a resume from a checkpoint at `step`: every step is then once in metrics.jsonl. Rows of earlier steps that
        had been rewound come back, and unreadable lines go. Idempotent, also after a crash half way.

        Raises:
            Superseded: a later attempt has claimed the folder.
            WriteError: the new files cannot be written; the old ones are untouched.
        """
        self.close()
        _renew(self._claim, EVENTS)
        return sum(_rewind_file(self._claim, name, step) for name in (METRICS, EVALUATIONS))

    def close(self) -> None:
        """Close the files; the next record opens them again."""
        while self._open:
            _, descriptor = self._open.popitem()
            os.close(descriptor)

    def _event(self, kind: str, **fields: Any) -> None:
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        self._append(EVENTS, {"time": now, "kind": kind} | fields)

    def _append(self, name: str, row: dict[str, Any]) -> None:
        self._waiting.append((name, encode_row(row)))
        try:
            while self._waiting:
                self._write_first()
            self._refused_since = None
        except (WriteError, StorageError):
            now = time.monotonic()
            self._refused_since = now if self._refused_since is None else self._refused_since
            if now - self._refused_since >= self._patience_seconds:
                raise

    def _write_first(self) -> None:
        name, line = self._waiting[0]
        descriptor = self._descriptor(name)  # open before the claim is checked: a later attempt then makes its own
        size = os.fstat(descriptor).st_size
        with self._claim.change(f"append.{name}", lambda: os.ftruncate(descriptor, size)):
            _or_write_error(self._claim.folder / name, lambda: _write_line(descriptor, line))
        self._waiting.popleft()

    def _descriptor(self, name: str) -> int:
        """The open file of that name; if an overtaken attempt has replaced it, this attempt's is put back first."""
        path, descriptor = self._claim.folder / name, self._open.get(name)
        if descriptor is not None and not _or_write_error(path, lambda: _is_still_at(descriptor, path)):
            with contextlib.suppress(OSError), open(descriptor, "rb", closefd=False) as file:
                file.seek(0)
                self._claim.replace(name, file.read())
            os.close(self._open.pop(name))
        if name not in self._open:
            _or_write_error(path, lambda: _repair(self._claim, name))
            self._open[name] = _or_write_error(path, lambda: os.open(path, _APPEND, 0o644))
        return self._open[name]


def _is_still_at(descriptor: int, path: Path) -> bool:
    try:
        return is_at(descriptor, path)
    except OSError as error:
        if error.errno != errno.ESTALE:
            raise
        return False  # another client has removed it


_APPEND = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC


def _rewind_file(claim: Claim, name: str, step: int) -> int:
    rewound = rewound_name(name)
    kept: dict[tuple[int, str], bytes] = {}
    moved: list[bytes] = []
    lines, earlier = (_lines(claim.folder / file) for file in (name, rewound))
    for line in lines:
        key = _key(line, step)
        if key is None or key in kept:
            moved.append(line)
        else:
            kept[key] = line
    back = {key: line for line in earlier if (key := _key(line, step)) is not None and key not in kept}
    seen = set(earlier)  # a crash between the two replacements must not double the rows
    left = [line for line in earlier if line not in back.values()] + [line for line in moved if line not in seen]
    if left != earlier:
        claim.replace(rewound, b"".join(left))
    if is_there(claim.folder / name) or back:
        rows = kept | back
        claim.replace(name, b"".join(rows[key] for key in sorted(rows, key=lambda key: key[0])))
    return len(moved)


def _key(line: bytes, step: int) -> tuple[int, str] | None:
    """What a row is about, if that is not after `step`: its step, and its held-out set if it has one."""
    row = parse_row(line)
    if row is None or not isinstance(row.get("step"), int) or row["step"] > step:
        return None
    return row["step"], str(row.get("name", ""))


def _lines(path: Path) -> list[bytes]:
    """Its lines, each with a newline; none if it is absent."""
    try:
        lines = read_bytes(path).splitlines(keepends=True)
    except FileNotFoundError:
        return []
    return [line if line.endswith(b"\n") else line + b"\n" for line in lines]


def _repair(claim: Claim, name: str) -> None:
    """End the file with a complete line: add a missing newline, or leave out a torn line."""
    path = claim.folder / name
    if is_there(path) and (content := read_bytes(path)) and not content.endswith(b"\n"):
        _renew(claim, name)


def _renew(claim: Claim, name: str) -> None:
    """Replace the file by a copy without a torn last line."""
    if is_there(claim.folder / name):
        lines = _lines(claim.folder / name)
        claim.replace(name, b"".join(lines[:-1] if lines and parse_row(lines[-1]) is None else lines))


def _write_line(descriptor: int, line: bytes) -> None:
    before = os.fstat(descriptor).st_size
    try:
        written = os.write(descriptor, line)
        while written < len(line):  # a nearly full disk accepts a part, then fails
            written += os.write(descriptor, line[written:])
    except OSError:
        with contextlib.suppress(OSError):
            os.ftruncate(descriptor, before)
        raise


def _or_write_error(path: Path, write: Callable[[], Any]) -> Any:
    try:
        return write()
    except OSError as error:
        raise cannot_write(path, error) from error
