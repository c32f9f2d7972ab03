"""OpenAI's objects for completions and chats, whole and as the events of a stream."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from typing import Any, Protocol

import msgspec

from launcher.server.api_answers import (
    CallIds,
    Piece,
    build_chat_logprobs,
    build_message,
    build_prompt_logprobs,
    build_text_logprobs,
    build_usage,
    token_text,
)
from launcher.server.errors import ServiceError
from launcher.server.inflight_requests import NewToken
from launcher.server.request_planner import PlannedRequest
from model.text.tokenizer import Tokenizer
from model.text.tool_calls import Reasoning, Text

_LARGE_ANSWER = 500
"""Number of tokens with log-probabilities above which an answer is built in a thread."""


class AnswerWriter(Protocol):
    """The form of one API's answers."""

    def build(self, asked: PlannedRequest, pieces: Sequence[Sequence[Piece]]) -> bytes:
        """Return the JSON of a complete answer, from the pieces of each choice."""
        ...

    def write_events(self, asked: PlannedRequest, pieces: AsyncIterator[tuple[int, Piece]]) -> AsyncIterator[bytes]:
        """Yield the events of a stream. A ServiceError of `pieces` becomes the last event."""
        ...


class CompletionWriter:
    """Writes completions and chat completions."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def build(self, asked: PlannedRequest, pieces: Sequence[Sequence[Piece]]) -> bytes:
        """Return the JSON of a complete answer."""
        numbers = _choose_best(asked, pieces)
        choices = [self._build_choice(asked, number, pieces[number], len(asked.echo[number])) for number in numbers]
        for index, choice in enumerate(choices):
            choice["index"] = index
        answer = asked.naming.build(choices, self._count(asked), is_chunk=False)
        if asked.naming.is_chat:
            answer |= self._build_prompt_report(asked, 0)
        return msgspec.json.encode(answer)

    async def write_events(self, asked: PlannedRequest, pieces: AsyncIterator[tuple[int, Piece]]) -> AsyncIterator[bytes]:
        """Yield the chunks of a stream."""
        offsets = [len(text) for text in asked.echo]
        begun = [False] * len(asked.choices)
        try:
            if asked.naming.is_chat:
                opening = [
                    {"index": number, "delta": {"role": "assistant", "content": echo}, "logprobs": None, "finish_reason": None}
                    for number, echo in enumerate(asked.echo)
                ]
                yield _event(asked.naming.build(opening, None, is_chunk=True) | self._build_prompt_report(asked, 0))
            call_ids = [CallIds(is_short=asked.short_call_ids) for _ in asked.choices]
            async for number, piece in pieces:
                has_text = piece.parts if asked.naming.is_chat else piece.text
                if not has_text and not piece.finish_reason and asked.logprobs is None and not asked.with_token_ids:
                    continue
                build = partial(self._build_chunk, asked, number, piece, offsets[number], call_ids[number], is_first=not begun[number])
                yield await build_answer(0 if begun[number] else len(asked.scored[number]), build)
                begun[number] = True
                offsets[number] += sum(len(token_text(self._tokenizer, token.token_id)) for token in piece.tokens)
            if asked.with_usage:
                yield _event(asked.naming.build([], self._count(asked), is_chunk=True))
            yield b"data: [DONE]\n\n"
        except ServiceError as error:
            yield _event(error.to_json())

    def _build_chunk(self, asked: PlannedRequest, number: int, piece: Piece, offset: int, call_ids: CallIds, *, is_first: bool) -> bytes:
        choice = self._build_choice(asked, number, [piece], offset, call_ids, is_first=is_first)
        return _event(asked.naming.build([choice], None, is_chunk=True))

    def _build_choice(
        self,
        asked: PlannedRequest,
        number: int,
        pieces: Sequence[Piece],
        offset: int,
        chunk_ids: CallIds | None = None,
        *,
        is_first: bool = True,
    ) -> dict[str, Any]:
        """Build a choice, or a part of it if `chunk_ids` are given, which count its tool calls."""
        is_chunk, tokens = chunk_ids is not None, [_trim(token, asked.logprobs) for piece in pieces for token in piece.tokens]
        last = pieces[-1]
        choice: dict[str, Any] = {"index": number, "finish_reason": last.finish_reason, "logprobs": None, "stop_reason": last.stop_reason}
        if asked.with_token_ids:
            choice["token_ids"] = [token.token_id for token in tokens]
        if asked.naming.is_chat:
            parts = [part for piece in pieces for part in piece.parts if asked.with_reasoning or not isinstance(part, Reasoning)]
            if not is_chunk and asked.echo[number]:
                parts.insert(0, Text(asked.echo[number]))
            message = build_message(parts, chunk_ids or CallIds(is_short=asked.short_call_ids), is_delta=is_chunk)
            choice["delta" if is_chunk else "message"] = message
            if asked.logprobs is not None:
                choice["logprobs"] = build_chat_logprobs(self._tokenizer, tokens)
            return choice
        choice["text"] = (asked.echo[number] if is_first else "") + "".join(piece.text for piece in pieces)
        if asked.logprobs is not None:
            scored = [_trim(token, asked.logprobs) for token in asked.scored[number]] if is_first and asked.has_echo else []
            choice["logprobs"] = build_text_logprobs(self._tokenizer, scored, tokens, offset)
        return choice | (self._build_prompt_report(asked, number) if is_first else {})

    def _build_prompt_report(self, asked: PlannedRequest, number: int) -> dict[str, Any]:
        """Build what is reported about the prompt of a choice."""
        report: dict[str, Any] = {}
        if asked.prompt_logprobs is not None:
            report["prompt_logprobs"] = build_prompt_logprobs(self._tokenizer, asked.scored[number], asked.prompt_logprobs)
        if asked.with_token_ids:
            report["prompt_token_ids"] = list(asked.choices[number][0])
        return report

    def _count(self, asked: PlannedRequest) -> dict[str, int]:
        return build_usage(sum(map(len, asked.prompts)), sum(text.num_tokens for text in asked.texts))


def _trim(token: NewToken, top: int | None) -> NewToken:
    return token if top is None or len(token.top_logprobs) <= top else token._replace(top_logprobs=token.top_logprobs[:top])


def _choose_best(asked: PlannedRequest, pieces: Sequence[Sequence[Piece]]) -> list[int]:
    """List the choices to return: of each prompt's, those with the highest log-probability per token."""
    per_prompt = len(asked.choices) // len(asked.prompts)
    if per_prompt == asked.num_returned:
        return list(range(len(asked.choices)))
    means = [
        sum(token.logprob or 0.0 for piece in some for token in piece.tokens) / max(1, sum(len(piece.tokens) for piece in some))
        for some in pieces
    ]
    groups = (range(first, first + per_prompt) for first in range(0, len(pieces), per_prompt))
    return [number for group in groups for number in sorted(group, key=lambda one: -means[one])[: asked.num_returned]]


async def build_answer(num_logprobs: int, build: Callable[[], bytes]) -> bytes:
    """Run `build`, in a thread if the log-probabilities of many tokens would block the event loop."""
    return await asyncio.to_thread(build) if num_logprobs > _LARGE_ANSWER else build()


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False, allow_nan=False).encode() + b"\n\n"
