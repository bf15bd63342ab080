"""metrics.jsonl, evaluations.jsonl and events.jsonl: what the report, `status` and `verify` read.

A line is a JSON object, appended with one system call: a killed process leaves at most one torn line, at the end,
which the next start repairs.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dist_cpt.errors import WriteError
from dist_cpt.run_folder.json_files import cannot_write, encode_row, parse_row, replace_file
from dist_cpt.run_folder.names import EVALUATIONS, EVENTS, METRICS, rewound_name
from dist_cpt.run_folder.records import CheckpointRecord, EvaluationRecord, RunEnd, RunStart, StepRecord


class MetricsFile:
    """Observer that appends every record of a run to its folder.

    A line that the file system refuses (full disk, lost mount) waits, and all later ones behind it.

    Raises:
        WriteError: from every method, when lines have waited for `patience_seconds`.
    """

    def __init__(self, folder: Path, patience_seconds: float = 0.0) -> None:
        self._folder = folder
        self._patience_seconds = patience_seconds
        self._waiting: deque[tuple[str, bytes]] = deque()
        self._refused_since: float | None = None
        self._open: dict[str, int] = {}

    def on_start(self, start: RunStart) -> None:
        self.close()  # a rewind may have replaced the files since the first message
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
        )

    def on_step(self, record: StepRecord) -> None:
        self._append(METRICS, asdict(record))

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
            _or_write_error(self._folder / name, lambda descriptor=descriptor: os.fsync(descriptor))

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
        except WriteError:
            now = time.monotonic()
            self._refused_since = now if self._refused_since is None else self._refused_since
            if now - self._refused_since >= self._patience_seconds:
                raise

    def _write_first(self) -> None:
        name, line = self._waiting[0]
        path = self._folder / name
        if name not in self._open:
            _or_write_error(path, lambda: _repair(path))
            self._open[name] = _or_write_error(path, lambda: os.open(path, _APPEND, 0o644))
        _or_write_error(path, lambda: _write_line(self._open[name], line))
        self._waiting.popleft()


_APPEND = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC


def rewind(folder: Path, step: int) -> int:
    """Move rows and evaluations after `step` to the *.rewound.jsonl files; returns the number of rows moved.

    For a resume from a checkpoint at `step`, before the first record of the new attempt: every step is then once
    in metrics.jsonl. Idempotent, also after a crash half way. Unreadable lines move too.

    Raises:
        WriteError: the new files cannot be written; the old ones are untouched.
    """
    return sum(_rewind_file(folder / name, step) for name in (METRICS, EVALUATIONS))


def _rewind_file(path: Path, step: int) -> int:
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return 0
    kept, moved = [], []
    for line in lines:
        row = parse_row(line)
        keep = row is not None and isinstance(row.get("step"), int) and row["step"] <= step
        (kept if keep else moved).append(line if line.endswith(b"\n") else line + b"\n")
    if not moved:
        return 0
    rewound = path.with_name(rewound_name(path.name))
    earlier = rewound.read_bytes().splitlines(keepends=True) if rewound.exists() else []
    seen = set(earlier)  # a crash between the two replacements must not double the rows
    replace_file(rewound, b"".join(earlier + [line for line in moved if line not in seen]))
    replace_file(path, b"".join(kept))
    return len(moved)


def _repair(path: Path) -> None:
    """End the file with a complete line: add a missing newline, or cut a torn line."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return
    if not content or content.endswith(b"\n"):
        return
    start = content.rfind(b"\n") + 1
    with path.open("r+b") as file:
        if parse_row(content[start:]) is None:
            file.truncate(start)
        else:
            file.seek(0, os.SEEK_END)
            file.write(b"\n")


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
