"""Requests that no server should take, and clients that leave: what is sent, and what may come of it."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Any

from completion_client import COMPLETIONS, build_prompt, build_request
from http_client import Address, connect, read_head, send

CLOSED = "closed"
"""The server closed the connection without an answer."""
LEFT = "left"
"""The client closed it, as it meant to."""
_NO_REFUSALS = {"401", "403", "408", "429"}


@dataclass(frozen=True, slots=True)
class Target:
    """What malformed requests are made of."""

    address: Address
    model: str
    context_tokens: int
    """A prompt of more words is too long."""
    large_bytes: int
    """A body that is too large."""
    silence_seconds: float
    """A client that has sent half a header leaves after so long."""
    max_tokens: int

    def build(self, **changes: Any) -> bytes:
        """A good request but for the changes."""
        request = build_request(self.model, "time year people", self.max_tokens)
        return json.dumps({**request, **changes}).encode()


@dataclass(frozen=True, slots=True)
class Malformed:
    """One kind."""

    name: str
    send: Callable[[Target], Awaitable[str]]
    others: frozenset[str] = frozenset()
    """Outcomes that are right."""
    client_error: bool = True
    """Whether a status that blames the client is right, too."""

    def accepts(self, outcome: str) -> bool:
        """Whether it is right that this came of it."""
        blames = outcome.startswith("4") and len(outcome) == 3 and outcome not in _NO_REFUSALS
        return outcome in self.others or (self.client_error and blames)


async def _post(target: Target, body: bytes, path: str = COMPLETIONS) -> str:
    status = None
    try:
        async with send(target.address, "POST", path, body) as response:
            status = response.status
            if status < 500 and status != 413:
                await response.read()
            return str(status)
    except (OSError, EOFError):
        return CLOSED if status is None else f"{status}, cut"


async def _send_bad_json(target: Target) -> str:
    return await _post(target, b'{"model": ')


async def _send_wrong_types(target: Target) -> str:
    return await _post(target, target.build(prompt={"time": 1}, max_tokens="many"))


async def _send_long_prompt(target: Target) -> str:
    return await _post(target, target.build(prompt=build_prompt("too long", target.context_tokens + 16)))


async def _ask_unknown_model(target: Target) -> str:
    return await _post(target, target.build(model="no such model"))


async def _ask_unknown_route(target: Target) -> str:
    return await _post(target, target.build(), "/v1/no_such_route")


async def _send_large_body(target: Target) -> str:
    return await _post(target, target.build(prompt="a" * target.large_bytes))


async def _leave_stream(target: Target) -> str:
    try:
        async with send(target.address, "POST", COMPLETIONS, target.build()) as response:
            if response.status != 200:
                return str(response.status)
            pieces = 0
            async for event in response.events():
                pieces += 1
                if b'"error"' in event:
                    return "error in the stream"
                if pieces == 2:
                    return LEFT
            return "no stream"
    except (OSError, EOFError):
        return CLOSED


async def _fall_silent(target: Target) -> str:
    try:
        async with connect(target.address) as (reader, writer):
            head = target.address.build_head("POST", COMPLETIONS, 100)
            writer.write(head[: len(head) // 2])
            return str((await asyncio.wait_for(read_head(reader), target.silence_seconds)).status)
    except asyncio.TimeoutError:
        return LEFT
    except (OSError, EOFError):
        return CLOSED


KINDS = (
    Malformed("bad JSON", _send_bad_json),
    Malformed("wrong types", _send_wrong_types),
    Malformed("prompt too long", _send_long_prompt),
    Malformed("unknown model", _ask_unknown_model),
    Malformed("unknown route", _ask_unknown_route),
    # A server that does not read the rest of a body may have its connection reset before the answer is read.
    Malformed("body too large", _send_large_body, frozenset({CLOSED})),
    Malformed("left in the stream", _leave_stream, frozenset({LEFT}), client_error=False),
    Malformed("half a header", _fall_silent, frozenset({LEFT, CLOSED, "400", "408"}), client_error=False),
)


async def send_malformed(kind: Malformed, target: Target, timeout_seconds: float, retried: Iterable[int] = (429,)) -> str:
    """What came of one request, refusals for want of room left aside. Never raises."""

    async def send_until_taken() -> str:
        statuses = {str(status) for status in retried}
        while (outcome := await kind.send(target)) in statuses:
            await asyncio.sleep(0.2)
        return outcome

    try:
        return await asyncio.wait_for(send_until_taken(), timeout_seconds)
    except asyncio.TimeoutError:
        return "timeout"
    except ValueError as error:
        return f"not understood: {error}"
