"""A page served on the loopback interface during a run, rendered again when the run's files have changed."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from dist_cpt.errors import ConfigError, DistCptError

REFRESH_SECONDS = 10
LOOPBACK = "127.0.0.1"


def page_server(folders: Sequence[Path], make: Callable[[], str], port: int = 0) -> ThreadingHTTPServer:
    """A server of one page on 127.0.0.1; with port 0 on any free one.

    Raises:
        ConfigError: the port is taken.
    """
    page = _Page(folders, make)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            named = self.headers.get("Host", "").partition(":")[0]
            if named not in (LOOPBACK, "localhost"):  # DNS rebinding: another site's name for this address
                self.send_error(403)
            elif self.path != "/":
                self.send_error(404)
            else:
                body = page.content().encode("utf-8", errors="replace")
                self.send_response(200)
                self.send_header("Content-Type", "text/html; charset=utf-8")
                self.send_header("Content-Length", str(len(body)))
                self.send_header("Cache-Control", "no-store")
                self.end_headers()
                self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Requests are not logged."""

    try:
        return ThreadingHTTPServer((LOOPBACK, port), Handler)
    except OSError as error:
        raise ConfigError(f"--port {port}: {error.strerror}", remedy="leave it out for any free one") from error


class _Page:
    """The page as it was last rendered, once for all browsers."""

    def __init__(self, folders: Sequence[Path], make: Callable[[], str]) -> None:
        self._folders, self._make, self._lock = folders, make, threading.Lock()
        self._state: object = None
        self._html = ""

    def content(self) -> str:
        with self._lock:
            state = [_state(folder) for folder in self._folders]
            if state != self._state:
                try:
                    self._html = self._make()
                except DistCptError as error:  # the file system may come back
                    return error.message
                self._state = state
            return self._html


def _state(folder: Path) -> list[tuple[str, int, int]]:
    """Names, times and sizes of the files of a run folder itself."""
    try:
        with os.scandir(folder) as entries:
            stats = [(entry.name, entry.stat()) for entry in entries if entry.is_file()]
    except OSError:
        return []
    return sorted((name, stat.st_mtime_ns, stat.st_size) for name, stat in stats)
