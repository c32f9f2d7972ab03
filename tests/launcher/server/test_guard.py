"""What stands before the routes: keys, hosts, sizes and times, and an answer for every failure."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import uvicorn

from launcher.server import guard as http_guard
from launcher.server.app import build_app
from launcher.server.connection_places import ConnectionPlaces
from launcher.server.errors import queue_full
from launcher.server.guard import Guard, GuardedProtocol, Limits

Scope = dict[str, Any]


class Call:
    """One request that reaches a guard, and what came of it."""

    def __init__(self, limits: Limits, app: Any = None) -> None:
        self.bodies: list[bytes] = []
        self.counted: list[tuple[str, int]] = []
        self.sent: list[Any] = []
        self.read = 0
        self._app: Any = Guard(app or self._take, limits, lambda path, status: self.counted.append((path, status)))

    async def _take(self, scope: Any, receive: Any, send: Any) -> None:
        self.bodies.append((await receive())["body"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"taken"})

    def make(self, path: str = "/v1/completions", pieces: Sequence[bytes | None] = (b"{}",), method: str = "POST", **headers: str) -> int:
        """Send it; None: the caller goes away, or, as the last one, never sends the rest. The status, 0 for none."""
        said = {"content_type": "application/json", **headers} if method == "POST" else headers
        raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in said.items()]
        self.scope: Scope = {"type": "http", "method": method, "path": path, "headers": raw, "query_string": b"", "root_path": ""}
        left = list(pieces)

        async def receive() -> Any:
            self.read += 1
            if not left:
                await asyncio.Event().wait()
            piece = left.pop(0)
            if piece is None:
                return {"type": "http.disconnect"}
            return {"type": "http.request", "body": piece, "more_body": bool(left) or (len(pieces) > 1 and pieces[-1] is None)}

        async def send(message: Any) -> None:
            self.sent.append(message)

        asyncio.run(self._app(self.scope, receive, send))
        return self.sent[0]["status"] if self.sent else 0

    @property
    def error(self) -> dict[str, Any]:
        """What the answer says went wrong."""
        found: dict[str, Any] = json.loads(self.sent[1]["body"])["error"]
        assert found.keys() == {"message", "type", "param", "code"}
        return found

    @property
    def headers(self) -> dict[bytes, bytes]:
        return dict(self.sent[0]["headers"])


def limit(**values: Any) -> Limits:
    return Limits(**{"api_keys": (), "checks_host": False, "max_body_bytes": 10, "max_client_requests": 4, **values})


KEYED = limit(api_keys=(b"first", b"second"))


def test_what_fits_is_handed_on_as_a_whole_and_counted() -> None:
    call = Call(limit())
    assert call.make(pieces=[b"12345", b"", b"67890"], content_length="10") == 200
    assert (call.bodies, call.counted) == ([b"1234567890"], [("/v1/completions", 200)])


@pytest.mark.parametrize(
    ("pieces", "headers"),
    [
        ([b"x" * 11], {"content_length": "11"}),
        ([b"x" * 11], {}),
        ([b"x" * 6, b"x" * 5], {"transfer_encoding": "chunked"}),
        ([b"x" * 20, b"x"], {"content_length": "3"}),
    ],
)
def test_a_body_that_is_too_large_is_refused_with_and_without_a_said_length(pieces: list[bytes], headers: dict[str, str]) -> None:
    call = Call(limit())
    assert call.make(pieces=pieces, **headers) == 413
    assert call.error["code"] == "body_too_large" and call.bodies == [] and call.counted == [("/v1/completions", 413)]
    assert call.headers[b"connection"] == b"close"
    assert call.read == len(pieces), "a caller that still sends would not hear the answer"


def test_a_body_that_is_far_too_large_is_not_read_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_guard, "_DISCARDED_BYTES", 100)
    said = Call(limit())
    assert said.make(pieces=[b"x" * 50] * 10, content_length="500") == 413 and said.read == 0
    unsaid = Call(limit())
    assert unsaid.make(pieces=[b"x" * 50] * 10) == 413 and unsaid.read == 3


def test_a_body_that_does_not_come_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_guard, "BODY_SECONDS", 0.05)
    call = Call(limit())

    async def never(scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError

    call = Call(limit(), never)
    assert call.make(pieces=[]) == 408
    assert "was not received" in call.error["message"]


def test_a_caller_that_goes_away_gets_no_answer() -> None:
    call = Call(limit())
    assert call.make(pieces=[b"1", None]) == 0
    assert (call.bodies, call.counted) == ([], [])


@pytest.mark.parametrize(
    ("said", "status"),
    [
        (None, 401),
        ("", 401),
        ("Bearer", 401),
        ("Bearer ", 401),
        ("Bearer firs", 401),
        ("Bearer first2", 401),
        ("Basic first", 401),
        ("first", 401),
        ("Bearer second", 200),
        ("bearer first", 200),
        ("Bearer  first", 200),
    ],
)
def test_one_of_the_keys_is_needed(said: str | None, status: int) -> None:
    call = Call(KEYED)
    assert call.make(**({} if said is None else {"authorization": said})) == status
    if status == 401:
        assert call.error["code"] == "invalid_api_key" and call.bodies == []


def test_every_key_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []

    def compare(said: bytes, key: bytes) -> bool:
        compared.append(key)
        return said == key

    monkeypatch.setattr("launcher.server.guard.hmac.compare_digest", compare)
    assert Call(KEYED).make(authorization="Bearer first") == 200
    assert compared == [b"first", b"second"]


@pytest.mark.parametrize("path", ["/health", "/", "/page.js", "/page.css"])
def test_the_page_and_health_need_no_key(path: str) -> None:
    assert Call(KEYED).make(path) == 200
    assert Call(KEYED).make(f"{path}/x") == 401


def test_pages_of_named_sites_may_ask_without_a_key_whether_they_may_call_and_read_why_not() -> None:
    served = SimpleNamespace(version="0")
    front = SimpleNamespace(served=served, metrics=SimpleNamespace(count_request=lambda route, status: None))
    service: Any = SimpleNamespace(front=front, tokenizer=None)
    asked = {"origin": "https://a.example", "access_control_request_method": "POST"}
    for origins, statuses in ((("https://a.example",), (200, 401)), ((), (401, 401))):
        call = Call(KEYED)
        call._app = build_app(service, KEYED, origins)
        assert call.make(method="OPTIONS", **asked) == statuses[0]
        call.sent.clear()
        assert call.make(**asked) == statuses[1]
        assert (b"access-control-allow-origin" in call.headers) == bool(origins)


@pytest.mark.parametrize("kind", ["", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=a"])
def test_a_body_that_is_not_said_to_be_json_is_refused(kind: str) -> None:
    """A browser would send it for any page, without asking."""
    call = Call(limit())
    assert call.make(content_type=kind) == 400 and "Content-Type" in call.error["message"] and call.read == 0
    assert Call(limit()).make(content_type="Application/JSON; charset=utf-8") == 200


def test_a_key_names_its_caller_however_it_is_written() -> None:
    callers = []
    for words in ("Bearer second", "bearer   second ", "BEARER second"):
        call = Call(KEYED)
        assert call.make(authorization=words) == 200
        callers.append(call.scope[http_guard.CALLER])
    assert set(callers) == {"key 1"}


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("LOCALHOST:8000", 200),
        ("127.0.0.1:8000", 200),
        ("[::1]:8000", 200),
        ("[::1]", 200),
        ("evil.example", 403),
        ("evil.example:8000", 403),
        ("127.0.0.1.evil.example", 403),
        ("127.evil.example", 403),
        ("localhost.evil.example", 403),
        ("", 403),
        (None, 403),
    ],
)
def test_only_names_of_this_host_are_answered_where_nobody_needs_a_key(host: str | None, status: int) -> None:
    call = Call(limit(checks_host=True))
    assert call.make("/health", **({} if host is None else {"host": host})) == status
    if status == 403:
        assert call.error["type"] == "permission_error"


def test_refusals_of_the_application_are_answered_in_openais_form() -> None:
    async def refuse(scope: Any, receive: Any, send: Any) -> None:
        raise queue_full(3, 1, 3, 7)

    call = Call(limit(), refuse)
    assert call.make() == 429
    assert (call.error["code"], call.headers[b"retry-after"]) == ("queue_full", b"7")


def test_a_fault_is_answered_and_its_traceback_goes_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    async def fail(scope: Any, receive: Any, send: Any) -> None:
        raise RuntimeError("boom")

    call = Call(limit(), fail)
    assert call.make() == 500
    assert "boom" not in call.error["message"] and call.counted == [("/v1/completions", 500)]
    assert "RuntimeError: boom" in capsys.readouterr().err


def test_a_fault_in_the_middle_of_an_answer_gets_no_second_one(capsys: pytest.CaptureFixture[str]) -> None:
    async def fail(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise RuntimeError("boom")

    call = Call(limit(), fail)
    assert call.make() == 200 and len(call.sent) == 1
    assert "boom" in capsys.readouterr().err


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], socket.socket]]:
    """Connections to a server whose callers have half a second for the head of a request."""
    monkeypatch.setattr(http_guard, "HEADER_SECONDS", 0.5)
    monkeypatch.setattr(http_guard, "STALL_SECONDS", 0.5)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/long":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            for _ in range(2000):
                await send({"type": "http.response.body", "body": bytes(100_000), "more_body": True})
                await asyncio.sleep(0.001)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})

    guard = Guard(app, limit(), lambda path, status: None)
    protocol: Any = partial(GuardedProtocol, ConnectionPlaces(4, 4))
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(guard, http=protocol, ws="none", lifespan="off", loop="asyncio", log_level="critical"))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])), daemon=True)
    thread.start()
    connections = []

    def connect() -> socket.socket:
        connections.append(socket.create_connection(listener.getsockname(), timeout=60))
        return connections[-1]

    yield connect
    for connection in connections:
        connection.close()
    server.should_exit = True
    thread.join(60)
    listener.close()


@pytest.mark.parametrize("sent", [b"", b"GET / HTTP/1.1\r\nHost: a\r\nX-Slow: "])
def test_a_head_that_does_not_come_to_its_end_is_not_waited_for(serve: Callable[[], socket.socket], sent: bytes) -> None:
    connection = serve()
    connection.sendall(sent)
    assert connection.recv(100) == b"", "closed, with no answer"


def test_a_slow_second_head_on_one_connection_is_not_waited_for_either(serve: Callable[[], socket.socket]) -> None:
    connection = serve()
    connection.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
    answer = b""
    while not answer.endswith(b"ok"):
        answer += connection.recv(1000)
    assert answer.startswith(b"HTTP/1.1 200")
    connection.sendall(b"GET / HT")
    assert connection.recv(100) == b""


def test_a_head_that_is_there_has_no_time_limit_on_its_answer(serve: Callable[[], socket.socket]) -> None:
    connection = serve()
    connection.sendall(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n1")
    connection.settimeout(1.0)
    with pytest.raises(TimeoutError):
        connection.recv(100)
    connection.settimeout(60)
    connection.sendall(b"2")
    assert connection.recv(1000).startswith(b"HTTP/1.1 200")


def test_an_answer_that_is_not_read_is_not_kept_for_long(serve: Callable[[], socket.socket]) -> None:
    connection = serve()
    connection.sendall(b"GET /long HTTP/1.1\r\nHost: a\r\n\r\n")
    time.sleep(2)
    come = 0
    while piece := connection.recv(1 << 20):
        come += len(piece)
    assert come < 100e6, "closed before its end"


def test_an_answer_that_is_read_slowly_is_kept(serve: Callable[[], socket.socket]) -> None:
    connection = serve()
    connection.sendall(b"GET /long HTTP/1.1\r\nHost: a\r\n\r\n")
    for _ in range(10):
        time.sleep(0.1)
        for _ in range(40):
            assert connection.recv(1 << 18)


def test_a_connection_that_finds_no_place_is_told_so(serve: Callable[[], socket.socket]) -> None:
    begun = [serve() for _ in range(4)]
    for connection in begun:
        connection.sendall(
            b"POST / HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\n"
        )
        assert connection.recv(100).startswith(b"HTTP/1.1 100")
    late = serve()
    late.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
    assert late.recv(1000).startswith(b"HTTP/1.1 503")
    for connection in begun:
        connection.sendall(b"{}")
        assert connection.recv(1000).startswith(b"HTTP/1.1 200")
    again = serve()
    again.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
    assert again.recv(1000).startswith(b"HTTP/1.1 200")


def test_a_client_has_so_many_requests_in_progress_at_most() -> None:
    call = Call(limit(max_client_requests=1))

    async def ask_again(scope: Any, receive: Any, send: Any) -> None:
        """While one is in progress."""
        await call._app({**scope}, receive, send)

    inner = call._app._app
    call._app._app = ask_again
    assert call.make() == 429 and call.error["code"] == "too_many_requests"
    call._app._app = inner
    call.sent.clear()
    assert call.make() == 200


def test_bodies_of_all_clients_together_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_guard, "_HELD_BODIES", 0.5)
    call = Call(limit())
    assert call.make(pieces=[b"12345", b"6"]) == 503 and call.error["code"] == "busy"
    call.sent.clear()
    assert call.make(pieces=[b"12345"]) == 200, "what was held has been let go"


def test_the_same_fault_is_reported_once_a_second(capsys: pytest.CaptureFixture[str]) -> None:
    async def fail(scope: Any, receive: Any, send: Any) -> None:
        raise RuntimeError("boom")

    call = Call(limit(), fail)
    for _ in range(50):
        call.make()
        call.sent.clear()
    assert 1 <= capsys.readouterr().err.count("RuntimeError: boom") < 10
