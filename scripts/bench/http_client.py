"""A small HTTP/1.1 client over asyncio's streams, one connection a request: it costs little beside the server that it measures.

Knows chunked bodies, bodies with a length, bodies that end with the connection, and server-sent events. No TLS, no redirects.
What goes wrong with a connection is an OSError, or an EOFError when the server left in the middle of an answer.
What is no HTTP is a ValueError.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

_AT_ONCE_BYTES = 1 << 16
"""A longer request is written while its answer is read: a server may refuse it before it has all of it."""


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server listens."""

    host: str
    port: int
    prefix: str = ""
    """Before every path, without a slash at its end."""
    api_key: str | None = field(default=None, repr=False)

    @classmethod
    def parse(cls, url: str, api_key: str | None = None) -> "Address":
        """From http://host:port[/prefix]; a /v1 at its end may be there or not. Raises ValueError."""
        parts = urlsplit(url)
        if parts.scheme != "http" or not parts.hostname:
            raise ValueError(f"{url!r} is not http://host:port")
        return cls(parts.hostname, parts.port or 80, parts.path.rstrip("/").removesuffix("/v1"), api_key)

    def build_head(self, method: str, path: str, num_body_bytes: int) -> bytes:
        """Request line and headers."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        lines = [f"{method} {self.prefix}{path} HTTP/1.1", f"Host: {host}:{self.port}", "Connection: close"]
        if self.api_key:
            lines.append(f"Authorization: Bearer {self.api_key}")
        if method != "GET":
            lines += ["Content-Type: application/json", f"Content-Length: {num_body_bytes}"]
        return "\r\n".join([*lines, "", ""]).encode()


@dataclass(frozen=True, slots=True)
class Response:
    """An answer whose head has come; its body is read once."""

    status: int
    headers: Mapping[str, str]
    """By name in small letters."""
    reader: asyncio.StreamReader

    async def parts(self) -> AsyncIterator[bytes]:
        """The body as it comes."""
        if "chunked" in self.headers.get("transfer-encoding", "").lower():
            while size := int((await self._read_line()).partition(b";")[0], 16):
                part = await self.reader.readexactly(size + 2)
                yield part[:-2]
            while await self._read_line():
                pass
        elif "content-length" in self.headers:
            if size := int(self.headers["content-length"]):
                yield await self.reader.readexactly(size)
        else:
            while part := await self.reader.read(_AT_ONCE_BYTES):
                yield part

    async def events(self) -> AsyncIterator[bytes]:
        """The data of server-sent events, each of which has one line of data."""
        rest = b""
        async for part in self.parts():
            *lines, rest = (rest + part).split(b"\n")
            for line in lines:
                if line.startswith(b"data:"):
                    yield line[5:].strip()

    async def read(self) -> bytes:
        """All of the body."""
        return b"".join([part async for part in self.parts()])

    async def _read_line(self) -> bytes:
        line = await self.reader.readline()
        if not line.endswith(b"\n"):
            raise asyncio.IncompleteReadError(line, None)
        return line.strip()


@asynccontextmanager
async def connect(address: Address) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection that is dropped behind the block, whatever has not been sent or read."""
    reader, writer = await asyncio.open_connection(address.host, address.port)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()
        with suppress(OSError):
            await writer.wait_closed()


@asynccontextmanager
async def send(address: Address, method: str, path: str, body: bytes = b"") -> AsyncIterator[Response]:
    """Send a request; its answer as soon as the head is there."""
    async with connect(address) as (reader, writer):
        data = address.build_head(method, path, len(body)) + body
        if len(data) <= _AT_ONCE_BYTES:
            writer.write(data)
            yield await read_head(reader)
            return
        writing = asyncio.ensure_future(_write_slices(writer, data))
        try:
            yield await read_head(reader)
        finally:
            writing.cancel()
            with suppress(asyncio.CancelledError):
                await writing


async def read_head(reader: asyncio.StreamReader) -> Response:
    """Status and headers; what is only provisional (100 to 199) is passed over."""
    while True:
        first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        words = first.split(" ", 2)
        if len(words) < 2 or not words[0].startswith("HTTP/1.") or not words[1].isdecimal():
            raise ValueError(f"not an answer in HTTP/1: {first[:80]!r}")
        pairs = [line.partition(":") for line in lines if line]
        if int(words[1]) >= 200:
            return Response(int(words[1]), {name.strip().lower(): value.strip() for name, _, value in pairs}, reader)


async def fetch_json(address: Address, method: str, path: str, body: Mapping[str, Any] | None = None) -> tuple[int, Any]:
    """Status and object of an answer that is read as a whole; an answer that is no JSON is a ValueError."""
    async with send(address, method, path, b"" if body is None else json.dumps(body).encode()) as response:
        return response.status, json.loads(await response.read() or b"null")


async def _write_slices(writer: asyncio.StreamWriter, data: bytes) -> None:
    with suppress(OSError):  # The server refuses the rest: its answer tells why.
        for start in range(0, len(data), _AT_ONCE_BYTES):
            writer.write(data[start : start + _AT_ONCE_BYTES])
            await writer.drain()
