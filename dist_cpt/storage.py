"""Reading from a file system that may not answer: an errno is no statement about what a file contains.

What a file server refuses for a moment is asked for again; what it goes on refusing is a StorageError (exit code 66).
No reader takes either for damage.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from dist_cpt.errors import StorageError

T = TypeVar("T")
LOGGER = logging.getLogger("dist_cpt")

VARIABLE = "DIST_CPT_STORAGE_SECONDS"  # for which an errno is retried
DEFAULT_SECONDS = 60.0
MISSING_SHARE = 1 / 12  # of that time for a name that should be there: most are really gone
_FIRST_DELAY, _LAST_DELAY = 0.05, 5.0
# What a file system says about a name, not about itself: there is no such file, or it is something else.
ANSWERS = {
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENXIO, errno.EINVAL),
    errno.EEXIST,
}
_FORBIDDEN = {errno.EACCES, errno.EPERM}  # does not pass within a minute


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
    too, for a twelfth of the time: caches of a network file system may hide it.

    Raises:
        StorageError: it went on for too long, or reading is not permitted.
        OSError: an answer: there is no such file, or it is something else than a file.
    """
    first, delay = None, _FIRST_DELAY
    while True:
        try:
            return read()
        except Exception as error:
            failure = _failure(error)
            if failure is None:
                raise
            missing = failure.errno == errno.ENOENT
            if failure.errno in ANSWERS and not (missing and expected):
                raise
            now = time.monotonic()
            first = now if first is None else first
            limit = patience_seconds() * (MISSING_SHARE if missing else 1)
            if failure.errno in _FORBIDDEN or now - first >= limit:
                if missing:
                    raise
                raise StorageError(path, failure) from error
            if delay == _FIRST_DELAY:
                LOGGER.warning("%s: %s; trying again for %.0f s", path, failure.strerror, limit)
            time.sleep(min(delay, max(limit - (now - first), 0.0)))
            delay = min(2 * delay, _LAST_DELAY)


def read_bytes(path: Path, *, expected: bool = False) -> bytes:
    """The content of a regular file; errors as `patiently`."""

    def read() -> bytes:
        with os.fdopen(open_regular(path), "rb") as file:
            return file.read()

    return patiently(path, read, expected=expected)


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


def _failure(error: Exception) -> OSError | None:
    """The OSError in an exception; libraries in Rust raise their own classes with "(os error 5)" in the text."""
    if isinstance(error, OSError):
        return error if error.errno else None
    number = re.search(r"\(os error (\d+)\)", str(error))
    return OSError(int(number[1]), os.strerror(int(number[1]))) if number else None
