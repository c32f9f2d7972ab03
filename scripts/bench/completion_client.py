"""Streams of /v1/completions as a client sees them: when every piece came, what the text was, how it ended. And prompts to send.

Only what OpenAI's interface has, and `ignore_eos`, which vLLM, llama-server and tandem take.
"""

import asyncio
import json
import random
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from http_client import Address, Response, fetch_json, send
from tandem_bench import BenchError

COMPLETIONS = "/v1/completions"
OK = "ok"
WORDS = (
    "time year people way day man thing woman life child world school state family student group country problem hand part place case "
    "week company system program question work government number night point home water room mother area money story fact month lot "
    "right study book eye job word business issue side kind head house service friend father power hour game line end member law car "
    "city community name president team minute idea kid body information back parent face others level office door health person art"
).split()


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What came of a request."""

    outcome: str
    """OK when the stream came to its end with a reason; else a status, or words."""
    started: float
    """When the attempt was sent that was not refused; the clock is time.perf_counter."""
    ended: float
    text: str = ""
    times: tuple[float, ...] = ()
    """When each piece came."""
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    """As the server counts, where it does."""
    retry_after_seconds: float | None = None
    refusals: tuple[int, ...] = ()
    """Status of every attempt before this one."""

    @property
    def num_tokens(self) -> int:
        """As the server counts; the pieces where it does not."""
        return len(self.times) if self.completion_tokens is None else self.completion_tokens


def build_prompt(seed: str, num_words: int) -> str:
    """Words by chance, other ones for another seed from the first word on, so that no cache of prefixes helps."""
    chance = random.Random(seed)
    return " ".join(chance.choice(WORDS) for _ in range(max(1, num_words)))


def build_request(model: str, prompt: str, max_tokens: int) -> dict[str, Any]:
    """A stream of exactly `max_tokens` tokens, always the same ones."""
    request = {"model": model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
    return {**request, "stream": True, "stream_options": {"include_usage": True}}


async def find_model(address: Address) -> str:
    """The first that the server has. Raises BenchError."""
    try:
        status, answer = await fetch_json(address, "GET", "/v1/models")
    except (OSError, EOFError, ValueError) as error:
        raise BenchError(f"{address.host}:{address.port} does not answer: {error}") from None
    if status != 200:
        raise BenchError(f"GET /v1/models: status {status}")
    return str(answer["data"][0]["id"])


async def measure_tokens_per_word(address: Address, model: str, num_words: int = 64) -> float:
    """Of the prompts here, with this server's tokenizer; 1 when it does not tell. Raises BenchError."""
    request = build_request(model, build_prompt("tokens of a word", num_words), 1)
    answer = await complete(address, request, timeout_seconds=600)
    if answer.outcome != OK:
        raise BenchError(f"the first request failed: {answer.outcome}")
    return (answer.prompt_tokens or num_words) / num_words


async def complete(
    address: Address,
    request: Mapping[str, Any],
    *,
    timeout_seconds: float,
    retried: Collection[int] = (429,),
    pause_seconds: float = 0.0,
) -> Answer:
    """Send until it is not refused; a refusal's Retry-After is obeyed. Never raises: the outcome tells.

    `pause_seconds`: how long a slow client waits after each event of the stream.
    """
    deadline = time.perf_counter() + timeout_seconds
    refusals: list[int] = []
    while True:
        started = time.perf_counter()
        try:
            answer = await asyncio.wait_for(stream_completion(address, request, pause_seconds), max(0.01, deadline - started))
        except asyncio.TimeoutError:
            answer = Answer(outcome="timeout", started=started, ended=time.perf_counter())
        if answer.outcome not in map(str, retried) or time.perf_counter() >= deadline:
            return replace(answer, refusals=tuple(refusals))
        refusals.append(int(answer.outcome))
        seconds = 1.0 if answer.retry_after_seconds is None else answer.retry_after_seconds
        await asyncio.sleep(min(seconds, max(0.0, deadline - time.perf_counter())))


async def stream_completion(address: Address, request: Mapping[str, Any], pause_seconds: float = 0.0) -> Answer:
    """Send once, and read to the end, waiting `pause_seconds` after each event."""
    stream, started = _Stream(), time.perf_counter()
    retry_after = None
    try:
        async with send(address, "POST", COMPLETIONS, json.dumps(request).encode()) as response:
            if response.status == 200:
                await stream.read(response, pause_seconds)
            else:
                stream.outcome, retry_after = str(response.status), parse_seconds(response.headers.get("retry-after"))
    except asyncio.IncompleteReadError:
        stream.outcome = "cut"
    except OSError as error:
        stream.outcome = "cut" if stream.times else f"no answer: {type(error).__name__}"
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        stream.outcome = f"not understood: {error!r}"[:120]
    return Answer(
        outcome=stream.outcome,
        started=started,
        ended=time.perf_counter(),
        text="".join(stream.texts),
        times=tuple(stream.times),
        prompt_tokens=stream.usage.get("prompt_tokens"),
        completion_tokens=stream.usage.get("completion_tokens"),
        retry_after_seconds=retry_after,
    )


def parse_seconds(words: str | None) -> float | None:
    """Of a Retry-After that is a number; a date is taken as none."""
    try:
        return None if words is None else max(0.0, float(words))
    except ValueError:
        return None


def find_difference(expected: Answer, answer: Answer) -> str | None:
    """What is wrong with an answer, beside that of an undisturbed run; None when nothing is."""
    if answer.outcome != OK:
        return answer.outcome
    if answer.text != expected.text:
        return describe_difference(expected.text, answer.text)
    if answer.completion_tokens != expected.completion_tokens:
        return f"{answer.completion_tokens} tokens are said to be in it, not {expected.completion_tokens}"
    return None


def describe_difference(expected: str, text: str) -> str:
    """Where two texts part, and whether something is there twice or is missing."""
    pairs = zip(expected, text, strict=False)
    start = next((index for index, (one, other) in enumerate(pairs) if one != other), min(len(expected), len(text)))
    rest, more = text[start:], len(text) - len(expected)
    if more < 0 and expected.endswith(rest):
        return f"missing from character {start}: {expected[start : start - more]!r}"
    if more > 0 and text[start + more :] == expected[start:] and expected[:start].endswith(text[start : start + more]):
        return f"twice before character {start}: {text[start : start + more]!r}"
    return f"another text from character {start}: {rest[:40]!r}, not {expected[start : start + 40]!r}"


class _Stream:
    """What has come of a stream."""

    def __init__(self) -> None:
        self.outcome = "cut"
        self.texts: list[str] = []
        self.times: list[float] = []
        self.usage: Mapping[str, int] = {}

    async def read(self, response: Response, pause_seconds: float) -> None:
        reason = None
        async for event in response.events():
            if pause_seconds:
                await asyncio.sleep(pause_seconds)
            now = time.perf_counter()
            if self.outcome == OK:
                self.outcome = "something behind [DONE]"
                return
            if event == b"[DONE]":
                self.outcome = OK if reason else "no finish_reason"
                continue
            chunk = json.loads(event)
            if error := chunk.get("error"):
                self.outcome = f"error in the stream: {error.get('type') or error.get('message')}"
                return
            self.usage = chunk.get("usage") or self.usage
            for choice in chunk["choices"]:
                text = choice.get("text") or ""
                if text and reason:
                    self.outcome = "text behind finish_reason"
                    return
                reason = choice.get("finish_reason") or reason
                # A last chunk has often no text: it is no piece, unless there was none at all.
                if text or not reason or not self.times:
                    self.texts.append(text)
                    self.times.append(now)
