"""Every way a run can end, each with its exit code and its remedy.

An error that a user can cause prints as one line: what happened, where, the value, the remedy.
"""

from __future__ import annotations

import contextlib
import errno
import sys
from collections.abc import Iterator
from typing import Any, TextIO

EXIT_DONE = 0
EXIT_CONFIG = 64
EXIT_DATA = 65
EXIT_STORAGE = 66
EXIT_NODE = 69
EXIT_INTERNAL = 70
EXIT_NUMERICS = 71
EXIT_HANG = 72
EXIT_CANNOT_WRITE = 73
EXIT_CHECKPOINT = 74
EXIT_STOPPED = 75
EXIT_SUPERSEDED = 76

EXIT_WORDS = {
    EXIT_DONE: "done",
    EXIT_CONFIG: "configuration error",
    EXIT_DATA: "data error",
    EXIT_STORAGE: "storage unreadable",
    EXIT_NODE: "unfit node",
    EXIT_INTERNAL: "internal error",
    EXIT_NUMERICS: "numerical error",
    EXIT_HANG: "hang",
    EXIT_CANNOT_WRITE: "cannot write",
    EXIT_CHECKPOINT: "checkpoint invalid",
    EXIT_STOPPED: "stopped and saved",
    EXIT_SUPERSEDED: "superseded by another attempt",
}
# Another start would end the same way.
FINAL_CODES = (
    *(EXIT_CONFIG, EXIT_DATA, EXIT_NODE, EXIT_NUMERICS, EXIT_CANNOT_WRITE, EXIT_CHECKPOINT),
    EXIT_SUPERSEDED,
)


class DistCptError(Exception):
    """An ending with a documented exit code; `str(error)` is the one line a user sees."""

    exit_code = EXIT_INTERNAL
    agreed = False  # raised on every rank: only rank 0 prints it

    def __init__(self, message: str, *, remedy: str | None = None) -> None:
        self.message = message
        self.remedy = remedy
        super().__init__(message if remedy is None else f"{message} -- {remedy}")

    def __reduce__(self) -> tuple[Any, ...]:  # constructors differ; a worker process hands its error to its parent
        return _unpickled, (type(self), self.message, self.remedy)


def _unpickled(kind: type[DistCptError], message: str, remedy: str | None) -> DistCptError:
    error = kind.__new__(kind)
    DistCptError.__init__(error, message, remedy=remedy)
    return error


class ConfigError(DistCptError):
    """The recipe, a flag or the installation does not allow the run."""

    exit_code = EXIT_CONFIG


@contextlib.contextmanager
def config_error_on_failure(what: str, remedy: str) -> Iterator[None]:
    """Within it any error is a ConfigError: Triton, compilers and drivers raise errors of their own."""
    try:
        yield
    except Exception as error:
        raise ConfigError(f"{what}: {type(error).__name__}: {error}", remedy=remedy) from error


class MissingExtraError(ConfigError):
    """A feature was asked for whose optional packages are not installed."""

    def __init__(self, feature: str, extra: str) -> None:
        super().__init__(
            f"{feature} needs the extra '{extra}', which is not installed",
            remedy=f"pip install 'dist-cpt[{extra}]'",
        )


class Superseded(DistCptError):
    """A later attempt has taken over the run folder; this one must not write there any more."""

    exit_code = EXIT_SUPERSEDED


class DataError(DistCptError):
    """The corpus, the tokenizer or the token store cannot be used as asked."""

    exit_code = EXIT_DATA


class StorageError(DistCptError):
    """The file system does not answer for a file; nothing is known about its content, and nothing was changed."""

    exit_code = EXIT_STORAGE

    def __init__(self, path: object, error: OSError) -> None:
        code = errno.errorcode.get(error.errno or 0, "no errno")
        super().__init__(
            f"{path} cannot be read: {error.strerror or error} ({code})",
            remedy="restore the file system, then start again: nothing was moved or removed",
        )


class NodeError(DistCptError):
    """A node failed the checks before the start; the run may start on others."""

    exit_code = EXIT_NODE


class NumericsError(DistCptError):
    """Non-finite or otherwise impossible numbers; also a broken trainability contract."""

    exit_code = EXIT_NUMERICS


class HangError(DistCptError):
    """A rank made no progress within its limit."""

    exit_code = EXIT_HANG


class WriteError(DistCptError):
    """The run folder cannot be written; earlier checkpoints are untouched."""

    exit_code = EXIT_CANNOT_WRITE


class CheckpointError(DistCptError):
    """A checkpoint is damaged, or none is usable."""

    exit_code = EXIT_CHECKPOINT


class Stopped(DistCptError):
    """The run was asked to stop, saved, and can be resumed."""

    exit_code = EXIT_STOPPED


def printable(text: str) -> str:
    """`text` as one line: line breaks and control characters, which a file may contain, are spelled out."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def brief(error: BaseException) -> str:
    """What an exception of another library says, on one line; its type if it says nothing."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:297]}..."


def say(text: str, stream: TextIO | None = None) -> None:
    """Print one line, to stderr by default; a closed terminal or pipe is ignored."""
    with contextlib.suppress(OSError, ValueError):
        print(text, file=sys.stderr if stream is None else stream, flush=True)
