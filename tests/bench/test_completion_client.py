"""What is said of a stream, and of two texts that should be the same."""

import asyncio
import json
from typing import Any

import pytest

from completion_client import OK, Answer, build_prompt, build_request, complete, describe_difference, find_difference, parse_seconds
from http_client import Address

END = {"choices": [{"text": "", "finish_reason": "length"}]}
USAGE = {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}}


def ask(*answers: bytes, retried: tuple[int, ...] = (429,), timeout_seconds: float = 10) -> Answer:
    """The answer of a server that gives these, one after another, to as many requests."""
    left = list(answers)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            size = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
            assert json.loads(await reader.readexactly(size))["ignore_eos"]
            if left:
                writer.write(left.pop(0))
            else:
                await reader.read()
        finally:
            writer.close()

    async def run() -> Answer:
        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            address = Address("127.0.0.1", server.sockets[0].getsockname()[1])
            return await complete(address, build_request("m", "a", 2), timeout_seconds=timeout_seconds, retried=retried)

    return asyncio.run(run())


def refuse(status: int, *headers: str) -> bytes:
    return "\r\n".join([f"HTTP/1.1 {status} -", "Content-Length: 0", *headers, "", ""]).encode()


def stream(*events: dict[str, Any] | str) -> bytes:
    data = [event if isinstance(event, str) else json.dumps(event) for event in events]
    return b"HTTP/1.1 200 OK\r\n\r\n" + "".join(f"data: {one}\n\n" for one in data).encode()


def piece(text: str) -> dict[str, Any]:
    return {"choices": [{"text": text, "finish_reason": None}]}


def test_a_whole_stream_has_its_text_its_times_and_the_servers_counts() -> None:
    answer = ask(stream(piece("a"), piece(" b"), END, USAGE, "[DONE]"))
    assert (answer.outcome, answer.text, answer.prompt_tokens, answer.num_tokens) == (OK, "a b", 3, 2)
    assert len(answer.times) == 2
    assert answer.started <= answer.times[0] <= answer.times[1] <= answer.ended


def test_pieces_are_counted_where_the_server_does_not() -> None:
    assert ask(stream(piece("a"), piece("b"), END, "[DONE]")).num_tokens == 2
    assert ask(stream(END, "[DONE]")).num_tokens == 1


@pytest.mark.parametrize(
    ("answer", "outcome"),
    [
        (refuse(500), "500"),
        (stream(piece("a")), "cut"),
        (stream(piece("a"), "[DONE]"), "no finish_reason"),
        (stream(piece("a"), END, "[DONE]", piece("a")), "something behind [DONE]"),
        (stream(piece("a"), END, piece("b"), "[DONE]"), "text behind finish_reason"),
        (stream(piece("a"), {"error": {"type": "server_error", "message": "x"}}), "error in the stream: server_error"),
        (stream("{"), "not understood"),
        (stream({}), "not understood"),
        (b"SSH\r\n\r\n", "not understood"),
        (b"", "cut"),
    ],
)
def test_what_is_no_whole_stream_is_told_apart(answer: bytes, outcome: str) -> None:
    assert ask(answer).outcome.startswith(outcome)


def test_refusals_are_sent_again_after_their_time_and_counted() -> None:
    good = stream(piece("a"), END, "[DONE]")
    answer = ask(refuse(429, "Retry-After: 0.2"), refuse(503, "retry-after: 0"), good, retried=(429, 503))
    assert (answer.outcome, answer.refusals) == (OK, (429, 503))
    assert ask(refuse(503), good).outcome == "503"


def test_refusals_and_silence_end_with_the_time_of_a_request() -> None:
    assert ask(*[refuse(429, "Retry-After: 60")] * 9, timeout_seconds=0.2).refusals == (429,)
    assert ask(timeout_seconds=0.2).outcome == "timeout"


def test_a_server_that_is_not_there_is_no_answer() -> None:
    async def run() -> Answer:
        return await complete(Address("127.0.0.1", 1), build_request("m", "a", 2), timeout_seconds=10)

    assert asyncio.run(run()).outcome == "no answer: ConnectionRefusedError"


def test_retry_after_may_be_a_number_or_unknown() -> None:
    assert [parse_seconds(words) for words in ("2", "0.5", "-1", "Wed, 21 Oct 2026 07:28:00 GMT", None)] == [2.0, 0.5, 0.0, None, None]


def test_prompts_are_the_same_for_a_seed_and_differ_otherwise() -> None:
    assert build_prompt("a", 32) == build_prompt("a", 32)
    assert len({build_prompt(str(seed), 32) for seed in range(100)}) == 100
    assert len(build_prompt("a", 32).split()) == 32


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("one two two three", "twice before character 9: 'wo t'"),
        ("one three", "missing from character 5: 'wo t'"),
        ("one two", "missing from character 7: ' three'"),
        ("one two threethree", "twice before character 13: 'three'"),
        ("one two four", "another text from character 8: 'four', not 'three'"),
        ("", "missing from character 0: 'one two three'"),
    ],
)
def test_difference_tells_what_is_twice_missing_or_other(text: str, words: str) -> None:
    assert describe_difference("one two three", text) == words


def test_an_answer_has_to_have_the_text_and_as_many_tokens() -> None:
    def answer(text: str, tokens: int, outcome: str = OK) -> Answer:
        return Answer(outcome=outcome, started=0, ended=1, text=text, completion_tokens=tokens)

    assert find_difference(answer("a", 1), answer("a", 1)) is None
    assert find_difference(answer("a", 1), answer("a", 2)) == "2 tokens are said to be in it, not 1"
    assert find_difference(answer("a", 1), answer("a", 1, "cut")) == "cut"
    assert find_difference(answer("a", 1), answer("aa", 1)) == "twice before character 1: 'a'"
