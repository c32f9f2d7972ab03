"""The small HTTP client against servers that answer byte by byte, provisionally, too early or not to the end."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from http_client import Address, Response, send

HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


def exchange(answer: bytes, use: Callable[[Response], Awaitable[object]], body: bytes = b"{}", read_bytes: int | None = None) -> object:
    """What `use` makes of an answer that comes in slices of one byte; the server reads so much of the request."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly(len(body) if read_bytes is None else read_bytes)
            for value in answer:
                writer.write(bytes([value]))
                await asyncio.sleep(0)
            if read_bytes is not None:
                await asyncio.sleep(0.1)  # The rest of the request is not read.
        finally:
            writer.close()

    async def run() -> object:
        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            async with send(Address("127.0.0.1", port), "POST", "/", body) as response:
                return await use(response)

    return asyncio.run(run())


async def read_status(response: Response) -> int:
    return response.status


async def list_events(response: Response) -> list[bytes]:
    return [event async for event in response.events()]


def test_body_is_read_in_chunks_by_length_or_to_the_end() -> None:
    assert exchange(HEAD + b"3;x=y\r\nabc\r\n2\r\nde\r\n0\r\nTrailer: 1\r\n\r\n", Response.read) == b"abcde"
    assert exchange(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nabcdefg", Response.read) == b"abcde"
    assert exchange(b"HTTP/1.0 200 OK\r\n\r\nabcde", Response.read) == b"abcde"
    assert exchange(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", Response.read) == b""


def test_events_are_found_across_chunks_and_both_kinds_of_line_ends() -> None:
    body = b"6\r\ndata: \r\n3\r\n{1}\r\n3\r\n\n\n:\r\n2\r\n \n\r\nf\r\ndata:[DONE]\r\n\r\n\r\n0\r\n\r\n"
    assert exchange(HEAD + body, list_events) == [b"{1}", b"[DONE]"]


def test_provisional_answers_are_passed_over() -> None:
    assert exchange(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", read_status) == 404


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 200", HEAD, HEAD + b"3\r\nab", HEAD + b"2\r\nab\r\n", HEAD + b"2\r\nab\r\n0\r\n"])
def test_an_answer_that_is_cut_is_an_end_of_file(answer: bytes) -> None:
    with pytest.raises(EOFError):
        exchange(answer, Response.read)


def test_what_is_no_http_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="SSH"):
        exchange(b"SSH-2.0-x\r\n\r\n", Response.read)


def test_a_long_request_is_refused_before_all_of_it_is_sent() -> None:
    answer = b"HTTP/1.1 413 -\r\nContent-Length: 0\r\n\r\n"
    assert exchange(answer, read_status, body=b"a" * (32 << 20), read_bytes=10) == 413


def test_address_comes_from_a_url_and_keeps_its_key_to_itself() -> None:
    assert Address.parse("http://127.0.0.1:8000/v1/") == Address("127.0.0.1", 8000)
    assert Address.parse("http://[::1]:80/a") == Address("::1", 80, "/a")
    address = Address.parse("http://localhost", "secret")
    assert (address.port, address.api_key) == (80, "secret")
    assert b"\r\nAuthorization: Bearer secret\r\n" in address.build_head("GET", "/health", 0)
    assert "secret" not in repr(address)
    for url in ("https://a", "localhost:8000", "http://"):
        with pytest.raises(ValueError, match="is not http"):
            Address.parse(url)
