"""A `tandem serve` that has been started, and how tests talk to it."""

import http.client
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import openai

if TYPE_CHECKING:
    from tests.end_to_end.conftest import Running, Tandem

PROJECT_ROOT = Path(__file__).resolve().parents[2]
SECONDS = 120
"""How long anything may take on a busy machine."""


def wait_until(condition: Callable[[], object], what: str, seconds: float = SECONDS) -> None:
    """Poll. Fails with `what` when it does not come true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not come true within {seconds} s"
        time.sleep(0.02)


def plant(folder: Path, text: str) -> dict[str, str]:
    """The variables of a run whose processes execute `text` when they start."""
    (folder / "sitecustomize.py").write_text(text)
    return {"PYTHONPATH": f"{folder}{os.pathsep}{PROJECT_ROOT}"}


class Server:
    """One server and its address."""

    def __init__(
        self, tandem: "Tandem", *arguments: str | Path, key: str | None = None, module: Sequence[str] = ("-m", "launcher"), **variables: str
    ) -> None:
        """It listens when this returns; its ranks may still load."""
        self.folder, self.key = tandem.new_folder(), key
        command = [sys.executable, *module, "serve", *arguments, "--port", "0", "--log-dir", self.folder / "logs"]
        # Standard error goes into a file: nobody has to read a pipe while the server runs.
        self.running: Running = tandem.start(command, stderr=self.folder / "stderr", **variables)
        wait_until(lambda: "listening on " in self.stderr or self.running.process.poll() is not None, "listening")
        found = re.search(r"^listening on http://127\.0\.0\.1:(\d+)", self.stderr, re.MULTILINE)
        assert found, self.stderr
        self.port = int(found[1])
        self._clients: list[openai.OpenAI] = []

    @property
    def stderr(self) -> str:
        """What it has said."""
        path = self.folder / "stderr"
        return path.read_text() if path.exists() else ""

    @contextmanager
    def connect(self) -> Iterator[http.client.HTTPConnection]:
        """A connection of one's own."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=SECONDS)
        try:
            yield connection
        finally:
            connection.close()

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, dict[str, str], Any]:
        """One request: status, headers (names in lower case), and the answer, out of its JSON where it is some.

        `body`: bytes go as they are, anything else as JSON.
        """
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        if self.key and "authorization" not in sent:
            sent["authorization"] = f"Bearer {self.key}"
        if body is not None:
            sent.setdefault("content-type", "application/json")
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        with self.connect() as connection:
            connection.request(method, path, data, sent)
            answer = connection.getresponse()
            content: Any = answer.read()
            found = {name.lower(): value for name, value in answer.getheaders()}
        if found.get("content-type") == "application/json":
            content = json.loads(content)
        return answer.status, found, content

    def complete(self, prompt: Any, **fields: Any) -> dict[str, Any]:
        """A whole completion."""
        status, _, answer = self.ask("POST", "/v1/completions", {"prompt": prompt, **fields})
        assert status == 200, answer
        return dict(answer)

    @contextmanager
    def stream(self, prompt: Any, path: str = "/v1/completions", **fields: Any) -> Iterator[Iterator[dict[str, Any]]]:
        """The events of a stream, as they come; the connection is closed at the end of the block, whatever is still to come."""
        with self.connect() as connection:
            headers = {"content-type": "application/json", **({"authorization": f"Bearer {self.key}"} if self.key else {})}
            connection.request("POST", path, json.dumps({"prompt": prompt, "stream": True, **fields}), headers)
            answer = connection.getresponse()
            assert answer.status == 200, answer.read()
            assert answer.getheader("content-type") == "text/event-stream; charset=utf-8"
            yield _read_events(answer)

    @property
    def client(self) -> openai.OpenAI:
        """OpenAI's own client."""
        if not self._clients:
            base = f"http://127.0.0.1:{self.port}/v1"
            self._clients.append(openai.OpenAI(base_url=base, api_key=self.key or "none", max_retries=0, timeout=SECONDS))
        return self._clients[0]

    @property
    def health(self) -> tuple[int, str]:
        """Status and word."""
        status, _, answer = self.ask("GET", "/health")
        return status, answer["status"]

    @property
    def status(self) -> dict[str, Any]:
        """What the page is told."""
        status, _, answer = self.ask("GET", "/status")
        assert status == 200, answer
        return dict(answer)

    def wait_until_ready(self) -> None:
        """Until its ranks answer."""

        def is_ready() -> bool:
            assert self.running.process.poll() is None, self.stderr
            return self.health[0] == 200

        wait_until(is_ready, "ready")

    def wait_until_idle(self) -> None:
        """Until nothing runs and no block is in use."""
        wait_until(lambda: [self.status[name] for name in ("running", "waiting", "blocks_used")] == [0, 0, 0], "idle")

    def end(self) -> None:
        """Kill it."""
        for client in self._clients:
            client.close()
        self.running.end()


def _read_events(answer: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    event: dict[str, Any] = {}
    while line := answer.readline():
        if line.startswith(b"data: ") and line != b"data: [DONE]\n":
            event = json.loads(line.removeprefix(b"data: "))
            yield event
        elif line != b"\n":
            assert line == b"data: [DONE]\n", line
            assert answer.read() in (b"\n", b"")
            return
    assert "error" in event, "the stream ended with neither [DONE] nor an error"
