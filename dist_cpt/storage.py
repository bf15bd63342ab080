"""Reading from a file system that may not answer: an errno is no statement about what a file contains.

A read that fails with such an errno is retried with back-off; if it still fails, it raises StorageError (exit code 66).
Neither is treated as damage.
"""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import os
import re
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from dist_cpt.errors import StorageError, WriteError

T = TypeVar("T")
LOGGER = logging.getLogger("dist_cpt")

VARIABLE = "DIST_CPT_STORAGE_SECONDS"  # for which an errno is retried
DEFAULT_SECONDS = 60.0
MISSING_SHARE = 1 / 20  # of that time for a name that should be there: most are really gone
_FIRST_DELAY, _LAST_DELAY = 0.05, 5.0
# What a file system says about a name, not about itself: there is no such file, or it is something else.
ANSWERS = {
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENXIO, errno.EINVAL),
    errno.EEXIST,
}
_FORBIDDEN = {errno.EACCES, errno.EPERM}  # does not pass within a minute
_SERVER_GONE = {errno.ETIMEDOUT, errno.ENOTCONN, errno.ESHUTDOWN, errno.EHOSTDOWN}  # sockets too, but without a name
_REFUSED_WRITES = {*_FORBIDDEN, errno.ENOSPC, errno.EDQUOT, errno.EROFS}


class NotRegularFile(OSError):
    """A pipe, a socket, a device or a folder where a file is expected; reading one could take for ever."""

    def __init__(self, path: object) -> None:
        super().__init__(errno.EINVAL, "not a regular file", str(path))


def patience_seconds() -> float:
    """For how long a read is tried again: DIST_CPT_STORAGE_SECONDS, a minute by default."""
    try:
        return max(0.0, float(os.environ[VARIABLE]))
    except (KeyError, ValueError):
        return DEFAULT_SECONDS


def patiently(path: object, read: Callable[[], T], *, expected: bool = False) -> T:
    """The result of `read`, which is called again, with back-off, while the file system does not answer.

    `read` must open what it reads: a stale handle stays stale. An `expected` name that is missing is looked for again
    too, for a twentieth of the time: caches of a network file system may hide it.

    `read` may also write, if doing that twice does no harm: a WriteError is retried by its errno, and stays one.

    Raises:
        StorageError: it went on for too long, or reading is not permitted.
        OSError: an answer: there is no such file, or it is something else than a file.
    """
    first, delay = None, _FIRST_DELAY
    while True:
        try:
            return read()
        except Exception as error:
            failure = os_error(error)
            if failure is None:
                raise
            missing = failure.errno == errno.ENOENT
            if failure.errno in ANSWERS and not (missing and expected):
                raise
            now = time.monotonic()
            first = now if first is None else first
            limit = patience_seconds() * (MISSING_SHARE if missing else 1)
            writes = isinstance(error, WriteError)
            if failure.errno in (_REFUSED_WRITES if writes else _FORBIDDEN) or now - first >= limit:
                if missing or writes:
                    raise
                raise StorageError(failure.filename or path, failure) from error
            if delay == _FIRST_DELAY:
                LOGGER.warning("%s: %s; trying again for %.0f s", path, failure.strerror, limit)
            time.sleep(min(delay, max(limit - (now - first), 0.0)))
            delay = min(2 * delay, _LAST_DELAY)


class PatientFile(io.RawIOBase):
    """A regular file, open for reading; when its handle goes bad it is opened again, patiently.

    `flags` such as O_NOFOLLOW; `expected` and errors as `patiently`.
    """

    def __init__(self, path: Path, flags: int = 0, *, expected: bool = False) -> None:
        self._path, self._flags, self._fd, self._offset = path, flags, -1, 0
        self._lock, self._stale = threading.Lock(), list[int]()  # other threads may still use a stale handle
        patiently(path, self._descriptor, expected=expected)

    def num_bytes(self) -> int:
        """The size of the file now."""
        return self._at(lambda fd: os.fstat(fd).st_size)

    def pread_into(self, buffer: memoryview, offset: int) -> int:
        """Fill a part of `buffer` from `offset` on; the number of bytes, 0 at the end."""
        return self._at(lambda fd: os.preadv(fd, [buffer], offset))

    def readinto(self, buffer: Any) -> int:
        count = self.pread_into(memoryview(buffer), self._offset)
        self._offset += count
        return count

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._offset}.get(whence)
        self._offset = offset + (self.num_bytes() if start is None else start)
        return self._offset

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        """Safe to call twice."""
        for descriptor in self._stale if self._fd < 0 else (*self._stale, self._fd):
            with contextlib.suppress(OSError):
                os.close(descriptor)
        self._stale, self._fd = [], -1
        super().close()

    def _descriptor(self) -> int:
        with self._lock:
            if self._fd < 0:
                self._fd = open_regular(self._path, self._flags)
            return self._fd

    def _at(self, call: Callable[[int], T]) -> T:
        def attempt() -> T:
            descriptor = self._descriptor()
            try:
                return call(descriptor)
            except OSError:
                with self._lock:  # a stale handle stays stale
                    if self._fd == descriptor:
                        self._stale.append(descriptor)
                        self._fd = -1
                raise

        return patiently(self._path, attempt, expected=True)


def read_bytes(path: Path, flags: int = 0, *, num_bytes: int = -1, expected: bool = False) -> bytes:
    """The content of a regular file, or its first bytes; errors as `patiently`."""
    with PatientFile(path, flags, expected=expected) as file:
        return file.read(num_bytes) or b""


def is_there(path: Path) -> bool:
    """Whether a name exists, as `Path.exists`, which takes an errno for an answer; errors as `patiently`."""
    try:
        patiently(path, path.stat)
    except OSError:
        return False
    return True


def open_regular(path: Path, flags: int = 0) -> int:
    """A descriptor of a regular file, open for reading; never waits for the writer of a pipe.

    Raises:
        NotRegularFile: it is something else.
        OSError: it cannot be opened.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | flags)
    except OSError as error:
        if error.errno == errno.ENXIO:  # a socket
            raise NotRegularFile(path) from None
        raise
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise NotRegularFile(path)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def explained(error: BaseException) -> BaseException:
    """A bare errno of the file system as the error that it is for a user; any other exception as it is."""
    if not isinstance(error, OSError):
        return error
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        where = error.filename or "a file"
        return WriteError(f"{where} cannot be written: {error.strerror}", remedy="free space there")
    if error.errno in (errno.EIO, errno.ESTALE) or (error.errno in _SERVER_GONE and error.filename):
        return StorageError(error.filename or "a file", error)
    return error


def os_error(error: Exception) -> OSError | None:
    """The OSError in an exception; libraries in Rust raise their own classes with "(os error 5)" in the text."""
    if isinstance(error, WriteError) and isinstance(error.__cause__, OSError):
        error = error.__cause__
    if isinstance(error, OSError):
        return error if error.errno else None
    number = re.search(r"\(os error (\d+)\)", str(error))
    return OSError(int(number[1]), os.strerror(int(number[1]))) if number else None
