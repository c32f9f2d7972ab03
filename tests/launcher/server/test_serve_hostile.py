"""A server among hostile clients: fuzzed requests, large bodies, many connections, upgrades. The application is real, its engine fake."""

import http.client
import json
import os
import random
import resource
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.launcher.server.test_api_requests import LARGE, build_large_body

NUM_REQUESTS = 2000
SECONDS = 60
JSON = {"content-type": "application/json"}
TICKS = os.sysconf("SC_CLK_TCK")


class HostedServer:
    """A process of `fake_engine.py`."""

    def __init__(self, folder: Path, *arguments: str, num_files: int | None = None) -> None:
        command = [sys.executable, str(Path(__file__).with_name("fake_engine.py")), *arguments]
        if num_files is not None:
            command = ["sh", "-c", f'ulimit -n {num_files}; exec "$@"', "sh", *command]
        self._stderr = folder / "stderr"
        with self._stderr.open("w") as stderr:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True)
        assert self.process.stdout is not None
        first = self.process.stdout.readline().split()
        assert first, self.stderr
        self.port, self.max_connections = map(int, first)

    @property
    def stderr(self) -> str:
        return self._stderr.read_text()

    @property
    def cpu_seconds(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS

    def read_kilobytes(self, name: str) -> int:
        """VmRSS or VmHWM."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(name))

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=SECONDS)

    def ask(self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=SECONDS)
        try:
            connection.request(method, path, body, JSON if headers is None else headers)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def check_alive(self) -> None:
        assert self.process.poll() is None, self.stderr
        assert self.ask("GET", "/health") == (200, b'{"status":"ok"}')
        status, answer = self.ask("POST", "/v1/completions", b'{"prompt":"a","max_tokens":3}')
        assert status == 200 and json.loads(answer)["choices"][0]["text"] == "abc"


@contextmanager
def host(folder: Path, *arguments: str, num_files: int | None = None) -> Iterator[HostedServer]:
    server = HostedServer(folder, *arguments, num_files=num_files)
    try:
        yield server
    finally:
        server.process.kill()
        server.process.communicate()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HostedServer]:
    with host(tmp_path_factory.mktemp("server"), "4") as server:
        yield server


class RequestFuzzer:
    """Requests by a seed: valid ones, changed in one or several places."""

    texts = ("", "a", "Once upon a time", "\x00", "\u2028", "é" * 300, "\U0001f600", "{{ 1 / 0 }}", "divide", "\ud800", "<|im_end|>")
    names = ("prompt", "messages", "max_tokens", "n", "stop", "seed", "logit_bias", "logprobs", "tools", "tool_choice", "stream", "x" * 50)

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def build_value(self, depth: int = 0) -> Any:
        choose = self._random.choice
        scalars = (None, True, False, 0, -1, 1, 2**31, 2**63, 10**300, 0.5, -1e308, 1e-320, choose(self.texts))
        kind = self._random.random()
        if kind < 0.7 or depth > 3:
            return choose(scalars)
        if kind < 0.85:
            return [self.build_value(depth + 1) for _ in range(self._random.randrange(4))]
        return {choose((*self.names, *self.texts)): self.build_value(depth + 1) for _ in range(self._random.randrange(4))}

    def build_completion(self) -> dict[str, Any]:
        choose = self._random.choice
        more = choose(({}, {"echo": True, "logprobs": 1}, {"logprobs": 0}, {"stream": True, "echo": True, "logprobs": 2}))
        return {"prompt": choose(("a", ["a", "b"], [1, 2], [[1], [2]])), "max_tokens": choose((0, 1, 5)), "n": choose((1, 2)), **more}

    def build_chat(self) -> dict[str, Any]:
        call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
        turns = [
            {"role": "system", "content": "a"},
            {"role": "user", "content": [{"type": "text", "text": "b"}]},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "1", "content": "c"},
            {"role": "user", "content": "divide"},
        ]
        return {"messages": self._random.sample(turns, self._random.randrange(1, 5)), "max_tokens": self._random.choice((1, 5))}

    def change(self, value: Any) -> Any:
        """One place of a JSON value replaced, removed or doubled."""
        if isinstance(value, dict) and value and self._random.random() < 0.9:
            key = self._random.choice(list(value))
            fate = self._random.random()
            if fate < 0.15:
                return {name: one for name, one in value.items() if name != key}
            if fate < 0.4:
                return value | {self._random.choice(self.names): self.build_value()}
            return value | {key: self.change(value[key])}
        if isinstance(value, list) and value and self._random.random() < 0.9:
            place = self._random.randrange(len(value))
            fate = self._random.random()
            if fate < 0.3:
                return value * self._random.choice((0, 2, 200))
            return [*value[:place], self.change(value[place]), *value[place + 1 :]]
        return self.build_value()

    def build(self) -> tuple[str, str, bytes | None, dict[str, str]]:
        """Method, path, body, headers."""
        choose, chance = self._random.choice, self._random.random
        is_chat = chance() < 0.5
        path = "/v1/chat/completions" if is_chat else "/v1/completions"
        value = self.build_chat() if is_chat else self.build_completion()
        for _ in range(choose((0, 1, 1, 2, 3))):
            value = self.change(value)
        body = json.dumps(value).encode()
        if chance() < 0.2 and body:  # bytes that are changed, removed or put in
            for _ in range(choose((1, 3))):
                place = self._random.randrange(len(body) + 1)
                middle = choose((b"", self._random.randbytes(1), self._random.randbytes(7), b"NaN", b"[" * 3000, b"9" * 500, b"\\ud83d"))
                body = body[:place] + middle + body[place + self._random.randrange(3) :]
        headers = dict(JSON)
        if chance() < 0.1:
            headers |= choose(({"content-type": "text/plain"}, {"upgrade": "websocket", "connection": "upgrade"}, {"x": "y" * 5000}))
        method = "POST" if chance() < 0.9 else choose(("GET", "PUT", "DELETE", "OPTIONS", "HEAD", "PATCH"))
        if chance() < 0.1:
            path = choose(
                ("/", "/health", "/metrics", "/status", "/version", "/v1/models", "/v1/models/%00", "//", "/%ff", "/v1/../etc", "*")
            )
        return method, path, body, headers


def test_no_fuzzed_request_fails_the_server(server: HostedServer, request: pytest.FixtureRequest) -> None:
    fuzzer = RequestFuzzer(17)
    before, statuses = server.read_kilobytes("VmRSS"), dict[int, int]()
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=SECONDS)
    request.addfinalizer(connection.close)
    used = server.cpu_seconds
    for number in range(NUM_REQUESTS):
        method, path, body, headers = asked = fuzzer.build()
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        content = answer.read()
        statuses[answer.status] = statuses.get(answer.status, 0) + 1
        assert answer.status < 500 or answer.status in (503, 504), (number, asked, content)
        if answer.status >= 400 and method != "HEAD":
            assert len(json.loads(content)["error"]["message"]) < 500, (number, asked)
        last, used = used, server.cpu_seconds
        assert used - last < 1, (number, asked)
    connection.close()
    assert server.read_kilobytes("VmHWM") - before < 200_000
    assert statuses[200] > NUM_REQUESTS // 10 and statuses[400] > NUM_REQUESTS // 4, statuses
    server.check_alive()
    assert "Traceback" not in server.stderr, server.stderr


@pytest.fixture
def watch_health(server: HostedServer) -> Iterator[Callable[[], float]]:
    """Asks for /health all the time; called, ends that and gives the longest time that an answer took."""
    over, longest = threading.Event(), [0.0]

    def ask() -> None:
        while not over.is_set():
            started = time.monotonic()
            assert server.ask("GET", "/health")[0] == 200
            longest[0] = max(longest[0], time.monotonic() - started)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()

    def end() -> float:
        over.set()
        thread.join(SECONDS)
        return longest[0]

    yield end
    end()


def test_large_bodies_hold_up_nobody(server: HostedServer, watch_health: Callable[[], float]) -> None:
    before = server.read_kilobytes("VmRSS")
    bodies = [build_large_body(name, size) for name in LARGE for size in (900_000, 3_900_000)]
    bodies += [b'{"prompt":"%s"}' % (b"word " * 700_000), b'{"messages":[{"role":"user","content":"%s"}]}' % (b"a" * 3_900_000)]
    for body in bodies:
        path = "/v1/chat/completions" if b'"messages"' in body[:20] else "/v1/completions"
        used = server.cpu_seconds
        status, answer = server.ask("POST", path, body)
        assert status in (200, 400), (body[:80], answer[:300])
        assert server.cpu_seconds - used < 2, body[:80]  # with what /health took meanwhile
    assert server.read_kilobytes("VmHWM") - before < 200_000
    assert watch_health() < 2
    server.check_alive()


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_of_many_prompts_come_in_order_and_hold_up_nobody(
    server: HostedServer, watch_health: Callable[[], float], stream: bool
) -> None:
    """As many as one request may ask for."""
    prompts = [[70 + place % 10 for place in range(500)] for _ in range(38)]
    body = {"prompt": prompts, "echo": True, "logprobs": 20, "max_tokens": 0, "stream": stream}
    status, answer = server.ask("POST", "/v1/completions", json.dumps(body).encode())
    assert status == 200
    events = [line[6:] for line in answer.splitlines() if line.startswith(b"data: {")] if stream else [answer]
    choices = [choice for event in events for choice in json.loads(event)["choices"]]
    assert sorted(choice["index"] for choice in choices) == list(range(38))
    for choice in choices:
        assert choice["text"] == "".join(choice["logprobs"]["tokens"]) == "FGHIJKLMNO" * 50
        assert choice["logprobs"]["token_logprobs"] == [None] + [-2.0] * 499
        assert choice["logprobs"]["text_offset"] == list(range(500)) and choice["finish_reason"] == "length"
    assert watch_health() < 2


def test_unknown_fields_are_named_once(server: HostedServer) -> None:
    for _ in range(20):
        assert server.ask("POST", "/v1/completions", b'{"prompt":"a","max_tokens":1,"once_only":{"a":[1]}}')[0] == 200
    assert server.stderr.count("once_only") == 1
    for number in range(300):
        server.ask("POST", "/v1/completions", b'{"prompt":"a","max_tokens":1,"field_%d":1}' % number)
    assert len(server.stderr.splitlines()) < 150


def test_requests_for_an_upgrade_are_answered_without_one(server: HostedServer) -> None:
    said = len(server.stderr)
    headers = {"upgrade": "websocket", "connection": "upgrade", "sec-websocket-key": "dGhlIHNhbXBsZQ==", "sec-websocket-version": "13"}
    for _ in range(100):
        assert server.ask("GET", "/health", headers=headers)[0] == 200
    assert len(server.stderr) == said


def test_what_is_no_http_is_refused_and_hardly_logged(server: HostedServer) -> None:
    said = len(server.stderr)
    started = time.monotonic()
    for _ in range(300):
        with server.connect() as connection:
            connection.sendall(b"\x16\x03\x01 no HTTP\r\n\r\n")
            assert connection.recv(1000).startswith(b"HTTP/1.1 400")
    lines = len(server.stderr[said:].splitlines())
    assert lines <= 2 + time.monotonic() - started
    server.check_alive()


def start_request(server: HostedServer, key: str = "") -> socket.socket:
    """A request whose body does not come to its end."""
    connection = server.connect()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: a\r\nauthorization: Bearer {key}\r\ncontent-type: application/json\r\n"
    connection.sendall(f"{head}expect: 100-continue\r\ncontent-length: 14\r\n\r\n".encode())
    assert connection.recv(1000).startswith(b"HTTP/1.1 100"), "the server reads the body"
    return connection


def test_a_client_has_so_many_requests_in_progress_at_most(tmp_path: Path) -> None:
    with host(tmp_path, "2", "first", "second") as server, ExitStack() as stack:

        def ask(key: str) -> int:
            headers = {**JSON, "authorization": f"Bearer {key}"}
            return server.ask("POST", "/v1/completions", b'{"prompt":"a","max_tokens":1}', headers)[0]

        begun = [stack.enter_context(start_request(server, "first")) for _ in range(2)]
        status, answer = server.ask("POST", "/v1/completions", b"{}", {**JSON, "authorization": "Bearer first"})
        assert (status, json.loads(answer)["error"]["code"]) == (429, "too_many_requests")
        assert ask("second") == 200
        begun[0].sendall(b'{"prompt":"a"}')
        assert begun[0].recv(1000).startswith(b"HTTP/1.1 200")
        assert ask("first") == 200
        begun[1].sendall(b'{"prompt": 5 }')
        assert begun[1].recv(1000).startswith(b"HTTP/1.1 400")
        assert [ask("first") for _ in range(3)] == [200] * 3


@pytest.fixture
def many_files() -> Iterator[None]:
    """Lets this process open 900 connections."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 1000:
        pytest.skip(f"the hard limit of open files is {hard}")
    if soft != resource.RLIM_INFINITY and soft < 1000:
        resource.setrlimit(resource.RLIMIT_NOFILE, (1000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_connections_beyond_the_descriptors_take_idle_ones_places(tmp_path: Path, many_files: None) -> None:
    with host(tmp_path, "4", num_files=200) as server, ExitStack() as stack:
        assert 16 <= server.max_connections < 200
        for _ in range(400):
            stack.enter_context(server.connect())
        server.check_alive()
        assert len(os.listdir(f"/proc/{server.process.pid}/fd")) < 200
        assert server.stderr == ""
        # Requests in progress do not give way: whoever comes then is told so.
        begun = [stack.enter_context(start_request(server)) for _ in range(4)]
        for _ in range(400):
            stack.enter_context(server.connect())
        for connection in begun:
            connection.sendall(b'{"prompt":"a"}')
            assert connection.recv(1000).startswith(b"HTTP/1.1 200")
        assert server.stderr == ""
