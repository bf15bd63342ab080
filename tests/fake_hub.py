"""A hub of our own: a data set repository served over HTTP as huggingface_hub and `datasets` ask for it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Repository:
    """One data set repository `name` with one commit of `files`."""

    name: str
    files: dict[str, bytes]
    commit: str = COMMIT
    requests: list[str] = field(default_factory=list)
    unavailable: str | None = None  # the file whose content is never sent

    def entry(self, path: str) -> dict[str, Any]:
        return {
            "type": "file",
            "path": path,
            "size": len(self.files[path]),
            "oid": hashlib.sha1(self.files[path]).hexdigest(),
        }

    def answer(self, path: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        """(status, headers, content) for a request."""
        api, download = f"/api/datasets/{self.name}", f"/datasets/{self.name}/resolve/"
        if path.startswith(download):
            revision, _, name = path.removeprefix(download).partition("/")
            return self._file(revision, name)
        if path != api and not path.startswith(f"{api}/"):
            return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
        kind, _, rest = path.removeprefix(api).strip("/").partition("/")
        revision, _, folder = rest.partition("/")
        if (revision or "main") not in ("main", self.commit):
            return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
        entries = [self.entry(name) for name in self.files] + [
            {"type": "directory", "path": name, "oid": hashlib.sha1(name.encode()).hexdigest()}
            for name in sorted({parent.as_posix() for file in self.files for parent in PurePosixPath(file).parents})
            if name != "."
        ]
        answers: dict[str, Any] = {
            "": self._info(),
            "revision": self._info(),
            "tree": [entry for entry in entries if str(PurePosixPath(entry["path"]).parent) == (folder or ".")],
            "paths-info": [entry for entry in entries if entry["path"] in json.loads(body or b"{}").get("paths", [])],
        }
        return 200, {"Content-Type": "application/json"}, json.dumps(answers[kind]).encode()

    def _info(self) -> dict[str, Any]:
        return {"id": self.name, "sha": self.commit, "siblings": [{"rfilename": name} for name in self.files]}

    def _file(self, revision: str, name: str) -> tuple[int, dict[str, str], bytes]:
        headers = {"X-Repo-Commit": self.commit}
        if revision not in ("main", self.commit):
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        if name not in self.files:
            return 404, headers | {"X-Error-Code": "EntryNotFound"}, b""
        return 200, headers | {"ETag": f'"{self.entry(name)["oid"]}"', "Accept-Ranges": "bytes"}, self.files[name]


@contextlib.contextmanager
def serving(repository: Repository) -> Iterator[str]:
    """The endpoint's address while it answers."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            path = unquote(urlsplit(self.path).path)
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status, headers, content = repository.answer(path, body)
            repository.requests.append(f"{self.command} {self.path} -> {status}")
            span = self.headers.get("Range", "").removeprefix("bytes=")
            if span and status == 200:
                first, _, last = span.partition("-")
                end = min(int(last or len(content)) + 1, len(content))
                headers["Content-Range"] = f"bytes {first}-{end - 1}/{len(content)}"
                status, content = 206, content[int(first) : end]
            self.send_response(status)
            for name, value in (headers | {"Content-Length": str(len(content))}).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD" and not (repository.unavailable and path.endswith(repository.unavailable)):
                self.wfile.write(content)
            else:
                self.close_connection = self.command != "HEAD"

        do_GET = do_HEAD = do_POST = answer

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()
