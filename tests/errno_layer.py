"""A file layer that fails: every system call on a path below a folder is counted, and chosen ones raise an errno.

The functions of `os` and the files of `open` are replaced, so whatever is written in Python is met; libraries in Rust
and memory-mapped pages are not.
"""

from __future__ import annotations

import builtins
import contextlib
import io
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Functions of `os` that take a path or a descriptor first.
_CALLS = (
    *("open", "stat", "lstat", "scandir", "listdir", "mkdir", "rmdir", "unlink", "remove", "rename", "replace", "link"),
    *("symlink", "readlink", "truncate", "ftruncate", "fstat", "fsync", "read", "pread", "preadv", "write", "pwrite"),
    "statvfs",
)
_path_of_descriptor = os.readlink


class ErrnoLayer:
    """Counts calls below `folder` whose path ends with `place`; call `at` (from 0) fails with `code`.

    Then the next ones work again, or with `for_ever` all of them fail, as if the server were gone.
    """

    def __init__(self, folder: Path, code: int = 0, at: int = -1, *, for_ever: bool = False, place: str = "") -> None:
        self.calls: list[tuple[str, str]] = []  # (function, path)
        self._folder, self._place = os.path.realpath(folder), place
        self._code, self._at, self._for_ever = code, at, for_ever

    def reached(self, function: str, path: Any) -> None:
        """Count a call, which may fail."""
        where = self._path(path)
        if not (where.startswith(self._folder) and where.endswith(self._place)):
            return
        number = len(self.calls)
        self.calls.append((function, where))
        if self._at >= 0 and (number == self._at or (self._for_ever and number > self._at)):
            raise OSError(self._code, os.strerror(self._code), where)

    def _path(self, path: Any) -> str:
        try:
            if isinstance(path, int):
                return _path_of_descriptor(f"/proc/self/fd/{path}")
            return os.path.abspath(os.fsdecode(path))
        except (OSError, TypeError):
            return ""

    def _wrapped(self, function: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def fail_or_call(*args: Any, **options: Any) -> Any:
            path = args[0] if args else options.get("path", ".")
            if (folder := options.get("dir_fd", options.get("src_dir_fd"))) is not None:
                path = os.path.join(self._path(folder), os.fsdecode(path))
            self.reached(function, path)
            return call(*args, **options)

        return fail_or_call

    @contextlib.contextmanager
    def installed(self) -> Iterator[ErrnoLayer]:
        """In the place of `os` and `open`."""
        real = {name: getattr(os, name) for name in _CALLS}
        real_open = builtins.open
        try:
            for name, call in real.items():
                setattr(os, name, self._wrapped(name, call))
            builtins.open = io.open = self._opener(real_open)  # type: ignore[assignment]
            yield self
        finally:
            builtins.open = io.open = real_open
            for name, call in real.items():
                setattr(os, name, call)

    def _opener(self, real_open: Callable[..., Any]) -> Callable[..., Any]:
        layer = self

        class Raw(io.FileIO):
            def readinto(self, buffer: Any) -> Any:
                layer.reached("read", self.fileno())
                return super().readinto(buffer)

            def readall(self) -> Any:
                layer.reached("read", self.fileno())
                return super().readall()

            def write(self, data: Any) -> Any:
                layer.reached("write", self.fileno())
                return super().write(data)

        def open_(file: Any, mode: str = "r", buffering: int = -1, *args: Any, **options: Any) -> Any:
            if isinstance(file, int) or not self._path(file).startswith(self._folder):
                return real_open(file, mode, buffering, *args, **options)
            self.reached("open", file)
            raw = Raw(file, mode.replace("b", "").replace("t", ""), opener=options.pop("opener", None))
            if "+" in mode:
                buffered: Any = io.BufferedRandom(raw)
            else:
                buffered = io.BufferedReader(raw) if "r" in mode else io.BufferedWriter(raw)
            return buffered if "b" in mode else io.TextIOWrapper(buffered, *args, **options)

        return open_


class SlowReads(ErrnoLayer):
    """Every read below `folder` of a path that ends with `place` takes `seconds`, from number `first` (from 0) on."""

    def __init__(self, folder: Path, place: str, first: int, seconds: float) -> None:
        super().__init__(folder, place=place)
        self._first, self._seconds = first, seconds

    def reached(self, function: str, path: Any) -> None:
        if function not in ("read", "pread", "preadv"):
            return
        number = len(self.calls)
        super().reached(function, path)
        if number >= self._first and len(self.calls) > number:
            time.sleep(self._seconds)
