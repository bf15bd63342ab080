"""Claims on pieces of work among processes that share a folder: a file each, created by one of them alone.

A claim decides who does a piece of work, not what is written: every result is renamed into place when it is complete
and does not depend on its maker, so doing a piece twice only wastes time.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import time
from functools import cache
from pathlib import Path
from typing import Any

from dist_cpt.storage import patiently

BEAT_SECONDS = 1.0
STALE_SECONDS = 180.0  # without a beat of another host's claim; caches of network file systems hide a beat for a minute
_UNWRITTEN_SECONDS = 5.0  # of a claim without its holder: it died between two instructions
_SUFFIX = ".claim"
_held: set[str] = set()  # the tokens of this process's own claims


class Claim:
    """A held claim, to be used in a with statement; `beat` shows that its holder lives, and how far it is."""

    def __init__(self, path: Path) -> None:
        """Create the file.

        Raises:
            FileExistsError: another process has it.
        """
        self.token = secrets.token_hex(4)
        self._path = path
        self._beaten = -BEAT_SECONDS
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            self._write(0, 0)
        except OSError:
            os.close(self._fd)
            with contextlib.suppress(OSError):
                path.unlink()
            raise
        _held.add(self.token)

    def beat(self, num_bytes: int, num_tokens: int) -> None:
        """Write down progress, at most once a second."""
        now = time.monotonic()
        if now - self._beaten < BEAT_SECONDS:
            return
        self._beaten = now
        self._write(num_bytes, num_tokens)

    def _write(self, num_bytes: int, num_tokens: int) -> None:
        holder = {"host": _host(), "pid": os.getpid(), "started": _started(os.getpid()), "token": self.token}
        line = json.dumps(holder | {"bytes": num_bytes, "tokens": num_tokens}).encode()
        os.pwrite(self._fd, line.ljust(512), 0)  # through the descriptor: never into a file that is another's by now

    def __enter__(self) -> Claim:
        return self

    def __exit__(self, *_: object) -> None:
        _held.discard(self.token)  # also if the file cannot be removed
        with contextlib.suppress(OSError):
            if self._path.stat().st_ino == os.fstat(self._fd).st_ino:
                self._path.unlink()
        os.close(self._fd)


def claim(folder: Path, name: str) -> Claim | None:
    """Claim `name` in `folder`; None if a living process has it. What a dead one was making is left behind.

    Raises:
        OSError: the folder cannot be written, or is gone.
    """
    path = folder / f"{name}{_SUFFIX}"
    for _ in range(2):
        try:
            return Claim(path)
        except FileExistsError:
            if is_held(path):
                return None
            aside = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
            with contextlib.suppress(FileNotFoundError):  # another was faster
                path.rename(aside)
                aside.unlink()
    return None


def progress_of(folder: Path) -> dict[str, tuple[int, int]]:
    """(bytes, tokens) of every claim in a folder, by name."""
    found = {}
    for path in folder.glob(f"*{_SUFFIX}"):
        holder = _holder(path)
        found[path.name.removesuffix(_SUFFIX)] = (holder.get("bytes", 0), holder.get("tokens", 0))
    return found


def is_held(path: Path) -> bool:
    """Whether the process that made this claim lives: on this host by its id, else by the time of its last beat."""
    holder = _holder(path)
    if holder.get("host") == _host():
        if holder["pid"] == os.getpid():  # what a failing file system has left of it is not held
            return holder["token"] in _held
        return _started(holder["pid"]) == holder["started"]
    try:
        limit = STALE_SECONDS if holder else _UNWRITTEN_SECONDS
        return _now(path.parent) - path.stat().st_mtime < limit
    except FileNotFoundError:
        return False


def _holder(path: Path) -> dict[str, Any]:
    try:
        return json.loads(patiently(path, path.read_bytes))
    except (ValueError, FileNotFoundError):  # just created, or just released
        return {}


def _now(folder: Path) -> float:
    """The time by the file system's clock, which stamps the beats of every host."""
    probe = folder / f"now.{secrets.token_hex(4)}"
    probe.touch()
    try:
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


@cache
def _host() -> str:
    """Where a process id means one process: host, boot and namespace."""
    parts = [socket.gethostname()]
    for read in (
        lambda: Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        lambda: os.readlink("/proc/self/ns/pid"),
    ):
        with contextlib.suppress(OSError):
            parts.append(read())
    return "/".join(parts)


def _started(pid: int) -> int | None:
    """When a process began, in clock ticks; None if there is none, or only what is left of one."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else int(fields[19])
