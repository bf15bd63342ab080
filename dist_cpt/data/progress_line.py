"""How far a preparation is, in one line: percent, MB/s, tokens/s and the time that is left."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import TextIO

from dist_cpt.data.prepare import Progress
from dist_cpt.errors import printable, say

TERMINAL_SECONDS, LOG_SECONDS = 0.5, 30.0


@contextlib.contextmanager
def shown_progress(stream: TextIO) -> Iterator[ProgressLine]:
    """The line on a stream: rewritten on a terminal, else a new one now and then."""
    if not stream.isatty():
        yield ProgressLine(lambda text: say(text, stream), LOG_SECONDS)
        return
    line = ProgressLine(lambda text: rewrite(stream, text), TERMINAL_SECONDS)
    try:
        yield line
    finally:
        rewrite(stream, "")


def rewrite(stream: TextIO, text: str) -> None:
    """Put `text` where the last line was; a closed terminal is ignored."""
    with contextlib.suppress(OSError, ValueError):
        stream.write(f"\r{text}\x1b[K")
        stream.flush()


class ProgressLine:
    """Says the line with `say`, at most once in `every_seconds`; what was done before the first call has no speed."""

    def __init__(self, say: Callable[[str], object], every_seconds: float) -> None:
        self._say, self._every_seconds = say, every_seconds
        self._first: tuple[float, Progress] | None = None
        self._last = -every_seconds

    def __call__(self, progress: Progress) -> None:
        now = time.monotonic()
        if self._first is None:
            self._first = now, progress
        if now - self._last < self._every_seconds:
            return
        self._last = now
        began, first = self._first
        self._say(progress_text(first, progress, now - began))


def progress_text(first: Progress, now: Progress, seconds: float) -> str:
    """The line, by what was done in the `seconds` since `first`."""
    share = now.num_bytes / now.total_bytes if now.total_bytes else 1.0
    text = f"preparing {printable(now.source)}: {share:.1%} of {now.total_bytes / 1e6:,.1f} MB"
    num_bytes = now.num_bytes - first.num_bytes
    if seconds <= 0 or num_bytes <= 0:
        return text
    left = round((now.total_bytes - now.num_bytes) / num_bytes * seconds)
    minutes, rest = divmod(left, 60)
    tokens = (now.num_tokens - first.num_tokens) / seconds
    ends = f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
    return f"{text}, {num_bytes / seconds / 1e6:,.1f} MB/s, {tokens:,.0f} tokens/s, {ends} left"
