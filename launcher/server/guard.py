"""ASGI middleware in front of the routes: API keys, host checks, size and time limits, and an error response if a route fails."""

import asyncio
import hmac
import json
import time
import traceback
from collections import Counter
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any, cast

import h11
from starlette.requests import ClientDisconnect
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

from launcher.host.loopback import is_loopback
from launcher.server.bounded_log import BoundedLog
from launcher.server.connection_places import OVERFLOW_PLACES, ConnectionPlaces
from launcher.server.errors import ServiceError, busy, server_failed, too_many_requests
from launcher.server.page_files import PAGE_FILES
from launcher.server.request_log import log_request

CALLER = "tandem.caller"
"""Scope key that identifies the API key of a request. Requests without one are identified by address."""
OPEN_PATHS = frozenset({*PAGE_FILES, "/health", "/ping"})
"""Paths that need no key: they reveal nothing about requests."""
HEADER_SECONDS = 10.0
BODY_SECONDS = 60.0
STALL_SECONDS = 60.0
"""Time a client may take to read sent data before the connection is dropped."""
MAX_HEADER_BYTES = 32 << 10
_HELD_BODIES = 16
"""Number of maximum-size bodies that all requests together may hold in memory."""
_DISCARDED_BYTES = 64 << 20
"""Bytes read and discarded of an oversized body: a client that is still sending would miss the error response."""

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
SendMessage = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, SendMessage], Awaitable[None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Limits on accepted requests."""

    api_keys: tuple[bytes, ...]
    """Accepted keys; if empty, no key is required."""
    checks_host: bool
    """Whether the Host header must name this host, which keeps pages of other sites away from a server without keys (DNS rebinding)."""
    max_body_bytes: int
    max_client_requests: int
    """Maximum number of requests with a body that one client may have in progress."""


class Guard:
    """Middleware that wraps an ASGI application."""

    def __init__(self, app: App, limits: Limits, count: Callable[[str, int], None]) -> None:
        """`count` receives the path and status of every response."""
        self._app, self._limits, self._count = app, limits, count
        self._requests: Counter[str] = Counter()
        """Requests in progress per client."""
        self._held_bytes = 0
        self._log = BoundedLog()

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: SendMessage) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            return
        status, began = 0, time.monotonic()

        async def note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            self._check(scope)
            check_content_type(scope)
            await self._answer(scope, receive, note)
        except ServiceError as error:
            await answer_error(error, note)
        except asyncio.TimeoutError:
            await answer_error(ServiceError(408, f"the request's body was not received within {BODY_SECONDS:g} s"), note)
        except (ConnectionError, ClientDisconnect):
            pass  # the client has disconnected
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            self._log.report(f"{type(error).__name__} {where.filename}:{where.lineno}", traceback.format_exc().rstrip())
            if not status:
                await answer_error(server_failed(), note)
        finally:
            if status:
                self._count(scope["path"], status)
                log_request(scope, status, time.monotonic() - began, scope.get(CALLER))

    async def _answer(self, scope: MutableMapping[str, Any], receive: Receive, send: SendMessage) -> None:
        if scope["method"] != "POST":
            return await self._app(scope, _replay(b"", receive), send)
        client, most = read_client(scope), self._limits.max_client_requests
        if self._requests[client] >= most:
            raise too_many_requests(most)
        self._requests[client] += 1
        body = bytearray()
        try:
            await asyncio.wait_for(self._read_body(scope, receive, body), BODY_SECONDS)
            await self._app(scope, _replay(bytes(body), receive), send)
        finally:
            self._held_bytes -= len(body)
            self._requests[client] -= 1
            if not self._requests[client]:
                del self._requests[client]

    def _check(self, scope: MutableMapping[str, Any]) -> None:
        headers = dict(scope["headers"])
        if self._limits.checks_host:
            host = headers.get(b"host", b"").decode("latin-1")
            name = host.rpartition(":")[0] if not host.endswith("]") and ":" in host else host
            if not is_loopback(name.strip("[]").lower()):
                words = f"the Host header is {host[:100]!r}, but without an API key only localhost and 127.0.0.1 are answered"
                raise ServiceError(403, words, kind="permission_error")
        if not self._limits.api_keys or scope["path"] in OPEN_PATHS:
            return
        scheme, _, said = headers.get(b"authorization", b"").partition(b" ")
        said = said.strip()
        if not scheme and (key := headers.get(b"x-api-key")) is not None:  # Anthropic's clients
            scheme, said = b"bearer", key.strip()
        # Compare all keys in constant time, so that the duration reveals nothing.
        fits = [hmac.compare_digest(said, key) for key in self._limits.api_keys]
        if scheme.lower() != b"bearer" or not any(fits):
            words = "no valid API key: send the header Authorization: Bearer KEY"
            raise ServiceError(401, words, kind="authentication_error", code="invalid_api_key")
        scope[CALLER] = f"key {fits.index(True)}"

    async def _read_body(self, scope: MutableMapping[str, Any], receive: Receive, body: bytearray) -> None:
        """Append received data to `body`. Raises ServiceError if it, or all bodies together, grow too large."""
        most = self._limits.max_body_bytes
        said = dict(scope["headers"]).get(b"content-length", b"0")
        size = int(said) if said.isdigit() else 0
        come, has_more = 0, True
        while has_more and max(size, come) <= most + _DISCARDED_BYTES:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ConnectionError
            piece, has_more = message.get("body", b""), message.get("more_body", False)
            come += len(piece)
            if max(size, come) <= most:
                if self._held_bytes + len(piece) > _HELD_BODIES * most:
                    raise busy()
                body += piece
                self._held_bytes += len(piece)
        size = max(size, come)
        if size > most:
            raise ServiceError(413, f"the request's body has {size} bytes or more, but the maximum is {most}", code="body_too_large")


def read_client(scope: MutableMapping[str, Any]) -> str:
    """Return the API key of a request's client, otherwise its address."""
    address = scope.get("client")
    return str(scope.get(CALLER) or (address[0] if address else ""))


def check_content_type(scope: MutableMapping[str, Any]) -> None:
    """Raise ServiceError unless the body is declared as JSON: browsers send other types for any page without a preflight request."""
    kind = dict(scope["headers"]).get(b"content-type", b"").partition(b";")[0].strip().lower()
    if scope["method"] == "POST" and kind != b"application/json":
        raise ServiceError(400, "the body is not taken for JSON: send the header Content-Type: application/json")


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that first yields the buffered body, then further messages."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


async def answer_error(error: ServiceError, send: SendMessage) -> None:
    """Send OpenAI's error object and close the connection; reading the rest of the request could otherwise take forever."""
    body = json.dumps(error.to_json()).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close", **error.headers}
    raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})


async def _refuse_connection(scope: MutableMapping[str, Any], receive: Receive, send: SendMessage) -> None:
    await answer_error(busy(), send)


class GuardedProtocol(H11Protocol):
    """uvicorn's protocol with limits on the number of connections, the time to receive a request's head, and the time to read a
    response."""

    def __init__(self, places: ConnectionPlaces, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._places = places
        self._head_timer: asyncio.TimerHandle | None = None
        self._stall_timer: asyncio.TimerHandle | None = None

    @property
    def is_idle(self) -> bool:
        """Whether no request is in progress."""
        cycle = cast("RequestResponseCycle | None", self.cycle)
        return cycle is None or cycle.response_complete

    def give_way(self) -> None:
        """Close the connection to make room for another."""
        self.transport.close()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Register a new connection."""
        super().connection_made(transport)
        if not self._places.enter(self, self.client[0] if self.client else ""):
            if len(self._places) > self._places.most + OVERFLOW_PLACES:
                transport.abort()
                return
            self.app = _refuse_connection
        self._start_head_timer()

    def data_received(self, data: bytes) -> None:
        """Process received bytes."""
        super().data_received(data)
        awaits_head = self.conn.their_state is h11.IDLE
        if not awaits_head:
            self._stop_head_timer()
        elif self._head_timer is None and self.conn.trailing_data[0]:
            self._start_head_timer()

    def on_response_complete(self) -> None:
        """Mark the connection as idle after a response."""
        self._places.note_idle(self)
        super().on_response_complete()

    def pause_writing(self) -> None:
        """Start the stall timer: the client reads more slowly than the server sends."""
        super().pause_writing()
        self._stop_stall_timer()
        self._stall_timer = self.loop.call_later(STALL_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        """Stop the stall timer: the client has caught up."""
        self._stop_stall_timer()
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        """Unregister the connection."""
        self._places.leave(self)
        self._stop_head_timer()
        self._stop_stall_timer()
        super().connection_lost(exc)

    def _unsupported_upgrade_warning(self) -> None:
        """Suppress the warning; an upgrade request is answered without upgrading, as HTTP allows."""

    def _start_head_timer(self) -> None:
        self._head_timer = self.loop.call_later(HEADER_SECONDS, self.transport.close)

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _stop_stall_timer(self) -> None:
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None
