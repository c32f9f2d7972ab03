"""What stands before the routes of a server: API keys, hosts, sizes and times of requests, and an answer where a route fails.

Knows ASGI and uvicorn; not what is asked.
"""

import asyncio
import hmac
import json
import sys
import traceback
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

import h11
from starlette.requests import ClientDisconnect
from uvicorn.protocols.http.h11_impl import H11Protocol

from launcher.rendezvous.key_value_store import is_loopback
from launcher.server.errors import ServiceError, server_failed
from launcher.server.page_files import PAGE_FILES

CALLER = "tandem.caller"
"""In the scope of a request with a key: which it is. Others are told apart by their addresses."""
OPEN_PATHS = frozenset({*PAGE_FILES, "/health"})
"""What needs no key: nothing of it tells of requests."""
HEADER_SECONDS = 10.0
BODY_SECONDS = 60.0
MAX_HEADER_BYTES = 32 << 10
_DISCARDED_BYTES = 64 << 20
"""Of a body that is too large, read at most: a caller that is still sending would not hear why its connection is closed."""

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
SendMessage = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, SendMessage], Awaitable[None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a server accepts."""

    api_keys: tuple[bytes, ...]
    """Any of these; none: nobody needs one."""
    checks_host: bool
    """Whether only names of this host itself may stand in the Host header: pages of other sites must not reach a server without a key."""
    max_body_bytes: int


class Guard:
    """Wraps an ASGI application."""

    def __init__(self, app: App, limits: Limits, count: Callable[[str, int], None]) -> None:
        """`count` gets path and status of every answer."""
        self._app, self._limits, self._count = app, limits, count

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: SendMessage) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            return
        status = 0

        async def note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            self._check(scope)
            check_content_type(scope)
            body = await asyncio.wait_for(self._read_body(scope, receive), BODY_SECONDS)
            await self._app(scope, _replay(body, receive), note)
        except ServiceError as error:
            await answer_error(error, note)
        except asyncio.TimeoutError:
            await answer_error(ServiceError(408, f"the request's body did not come within {BODY_SECONDS:g} s"), note)
        except (ConnectionError, ClientDisconnect):
            pass  # the caller has gone
        except Exception:
            traceback.print_exc(file=sys.stderr)
            if not status:
                await answer_error(server_failed(), note)
        finally:
            if status:
                self._count(scope["path"], status)

    def _check(self, scope: MutableMapping[str, Any]) -> None:
        headers = dict(scope["headers"])
        if self._limits.checks_host:
            host = headers.get(b"host", b"").decode("latin-1")
            name = host.rpartition(":")[0] if not host.endswith("]") and ":" in host else host
            if not is_loopback(name.strip("[]").lower()):
                words = f"the Host header says {host[:100]!r}, but without an API key only localhost and 127.0.0.1 are answered"
                raise ServiceError(403, words, kind="permission_error")
        if not self._limits.api_keys or scope["path"] in OPEN_PATHS:
            return
        scheme, _, said = headers.get(b"authorization", b"").partition(b" ")
        said = said.strip()
        # Every key is compared, in constant time: how long it takes tells nothing.
        fits = [hmac.compare_digest(said, key) for key in self._limits.api_keys]
        if scheme.lower() != b"bearer" or not any(fits):
            words = "no valid API key: send the header Authorization: Bearer KEY"
            raise ServiceError(401, words, kind="authentication_error", code="invalid_api_key")
        scope[CALLER] = f"key {fits.index(True)}"

    async def _read_body(self, scope: MutableMapping[str, Any], receive: Receive) -> bytes:
        most = self._limits.max_body_bytes
        said = dict(scope["headers"]).get(b"content-length", b"0")
        size = int(said) if said.isdigit() else 0
        body = bytearray()
        come, has_more = 0, True
        while has_more and max(size, come) <= most + _DISCARDED_BYTES:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ConnectionError
            piece, has_more = message.get("body", b""), message.get("more_body", False)
            come += len(piece)
            if max(size, come) <= most:
                body += piece
        size = max(size, come)
        if size <= most:
            return bytes(body)
        raise ServiceError(413, f"the request's body has {size} bytes or more, but {most} are taken at most", code="body_too_large")


def check_content_type(scope: MutableMapping[str, Any]) -> None:
    """Raise ServiceError for a body that is not said to be JSON: a browser would send it for any page, without asking."""
    kind = dict(scope["headers"]).get(b"content-type", b"").partition(b";")[0].strip().lower()
    if scope["method"] == "POST" and kind != b"application/json":
        raise ServiceError(400, "the body is not taken for JSON: send the header Content-Type: application/json")


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body at once, then what comes."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


async def answer_error(error: ServiceError, send: SendMessage) -> None:
    """OpenAI's form of an error. The connection is closed behind it: what the caller still sends would be waited for without a limit."""
    body = json.dumps(error.to_json()).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close", **error.headers}
    raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})


class TimedProtocol(H11Protocol):
    """uvicorn's protocol, with a limit on how long the head of a request may take to come."""

    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A caller has connected."""
        super().connection_made(transport)
        self._start_head_timer()

    def data_received(self, data: bytes) -> None:
        """Bytes have come."""
        super().data_received(data)
        awaits_head = self.conn.their_state is h11.IDLE
        if not awaits_head:
            self._stop_head_timer()
        elif self._head_timer is None and self.conn.trailing_data[0]:
            self._start_head_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """The caller has gone."""
        self._stop_head_timer()
        super().connection_lost(exc)

    def _start_head_timer(self) -> None:
        self._head_timer = self.loop.call_later(HEADER_SECONDS, self.transport.close)

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
