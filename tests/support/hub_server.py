"""A model hub on localhost that serves one model's folder."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def hub_of(folder: Path, monkeypatch, cache: Path) -> Iterator[list[str]]:
    """Serves ``folder`` as org/name to huggingface_hub in this process; yields the requests.

    Args:
        cache: the folder that stands for this machine's cache.
    """
    requests: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def _answer(self, with_body: bool) -> None:
            path = self.path.partition("?")[0]
            if path.startswith("/api/models/org/name"):
                siblings = [{"rfilename": file.name} for file in folder.iterdir()]
                status, content = 200, json.dumps({"id": "org/name", "sha": COMMIT, "siblings": siblings}).encode()
            else:
                file = folder / path.rpartition("/")[2]
                status, content = (200, file.read_bytes()) if file.is_file() else (404, b"")
            etag, headers = hashlib.sha256(content).hexdigest(), {}
            if with_body and (wanted := self.headers.get("range")) and status == 200:
                begin, end = map(int, wanted.removeprefix("bytes=").split("-"))
                status, headers = 206, {"Content-Range": f"bytes {begin}-{min(end, len(content) - 1)}/{len(content)}"}
                content = content[begin : end + 1]
            requests.append(f"{self.command} {path} {len(content) if with_body else 0}")
            self.send_response(status)
            if status == 404:
                headers["X-Error-Code"] = "EntryNotFound"
            headers |= {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "Content-Length": str(len(content))}
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            if with_body:
                self.wfile.write(content)

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    monkeypatch.setattr(
        "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    try:
        yield requests
    finally:
        server.shutdown()
        server.server_close()
