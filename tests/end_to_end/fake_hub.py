"""A Hugging Face hub on loopback: the parts of its HTTP API that huggingface_hub needs to download a model."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub:
    """Serves folders as repositories; `requests` holds every request line."""

    def __init__(self, repositories: dict[str, Path]) -> None:
        self.repositories, self.requests = repositories, list[str]()
        self.gated: set[str] = set()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _make_handler(self))

    @property
    def address(self) -> str:
        """For HF_ENDPOINT."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    @contextmanager
    def running(self) -> Iterator["FakeHub"]:
        """While the block runs."""
        thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            self._server.server_close()
            thread.join()

    def list_downloads(self) -> list[str]:
        """Names of the files that were downloaded."""
        return sorted(line.rsplit("/", 1)[1] for line in self.requests if line.startswith("GET") and "/resolve/" in line)


def _make_handler(hub: FakeHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer(send_body=False)

        def do_GET(self) -> None:
            self._answer(send_body=True)

        def log_message(self, format: str, *arguments: Any) -> None:
            """Silent."""

        def _answer(self, *, send_body: bool) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.requests.append(f"{self.command} {path}")
            api = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(?:revision|tree)/([^/]+))?(/.*)?", path)
            file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
            name, revision = (api or file or re.match("()()", ""))[1], (api or file or re.match("()()", ""))[2]
            folder = hub.repositories.get(name)
            if folder is None:
                self._send(401, b'{"error":"Repository not found"}', {"X-Error-Code": "RepoNotFound"}, send_body)
            elif name in hub.gated:
                self._send(403, b'{"error":"gated"}', {"X-Error-Code": "GatedRepo"}, send_body)
            elif revision not in (None, "main", "v1", COMMIT):
                self._send(404, b'{"error":"no such revision"}', {"X-Error-Code": "RevisionNotFound"}, send_body)
            elif api and "/tree/" in path:
                rows = [
                    {"type": "file", "path": one.relative_to(folder).as_posix(), "size": one.stat().st_size, "oid": _hash(one)}
                    for one in _list(folder)
                ]
                self._send(200, json.dumps(rows).encode(), {}, send_body)
            elif api:
                siblings = [
                    {"rfilename": one.relative_to(folder).as_posix(), "size": one.stat().st_size, "blobId": _hash(one)}
                    for one in _list(folder)
                ]
                info = {"_id": "1", "id": name, "modelId": name, "sha": COMMIT, "private": False, "tags": [], "siblings": siblings}
                self._send(200, json.dumps(info).encode(), {}, send_body)
            elif file and (folder / file[3]).is_file():
                wanted = folder / file[3]
                self._send(200, wanted.read_bytes(), {"ETag": f'"{_hash(wanted)}"', "X-Repo-Commit": COMMIT}, send_body)
            else:
                self._send(404, b'{"error":"Entry not found"}', {"X-Error-Code": "EntryNotFound"}, send_body)

        def _send(self, status: int, body: bytes, headers: dict[str, str], send_body: bool) -> None:
            self.send_response(status)
            for key, value in {"Content-Length": str(len(body)), "Content-Type": "application/json", **headers}.items():
                self.send_header(key, value)
            self.end_headers()
            if send_body:
                self.wfile.write(body)

    return Handler


def _list(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _hash(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()
