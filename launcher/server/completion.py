"""Completion and chat answers, complete or streamed: plans a request, queues it, follows its tokens, and builds OpenAI objects.

Routes and error responses are in `launcher/server/app.py`.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import msgspec
from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

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
from launcher.server.chat_prompts import ChatPrompts
from launcher.server.chat_rendering import ChatRenderer
from launcher.server.engine_client import EngineClient
from launcher.server.errors import ServiceError, client_gone
from launcher.server.guard import read_client
from launcher.server.inflight_requests import NewToken, PromptToken
from launcher.server.queue import Ticket
from launcher.server.request_planner import PlannedRequest, RequestPlanner
from launcher.server.request_threads import RequestThreads
from model.text.tokenizer import Tokenizer
from model.text.tool_calls import Reasoning, Text

_READING_SECONDS = 30.0
_LARGE_ANSWER = 500
"""Number of tokens with log-probabilities above which an answer is built in a thread."""
_SSE_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class Service:
    """State shared by the routes."""

    def __init__(
        self,
        front: EngineClient,
        tokenizer: Tokenizer,
        chat: ChatRenderer,
        max_seconds: float,
        *,
        strict_fields: bool = False,
        tool_call_parser: str | None = None,
    ) -> None:
        """`max_seconds` caps the deadline of a request. `strict_fields` rejects unknown fields instead of ignoring them.
        `tool_call_parser` names the form of the model's tool calls; None chooses it by the chat template."""
        self.front, self._tokenizer, self._chat = front, tokenizer, chat
        prompts = ChatPrompts(chat, tool_call_parser)
        self._planner = RequestPlanner(front, tokenizer, prompts, max_seconds, strict_fields=strict_fields)
        self._threads = RequestThreads()

    async def plan_completion(self, body: bytes) -> PlannedRequest:
        """Parse and plan a completion request. Raises ServiceError, RequestError."""
        return await self._threads.run(body, self._planner.plan_completion)

    async def plan_chat(self, body: bytes) -> PlannedRequest:
        """Parse and plan a chat completion request. Raises ServiceError, RequestError."""
        return await self._threads.run(body, self._planner.plan_chat, is_chat=True)

    def check_model(self, name: str) -> None:
        """Raise ServiceError if the requested model is not the served one."""
        self._planner.check_model(name)

    def close(self) -> None:
        """Stop reading requests and terminate the template process."""
        self._threads.close()
        self._chat.close()

    async def run(self, asked: PlannedRequest, request: Request) -> bytes:
        """Return the complete answer as JSON. Raises ServiceError."""
        ticket = self._submit(asked, request)
        gone = asyncio.create_task(_wait_until_gone(request))
        work = asyncio.create_task(self._collect(asked, ticket))
        try:
            await asyncio.wait((gone, work), return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                raise client_gone()
            return work.result()
        finally:
            self.front.dispatcher.close(ticket)
            for task in (gone, work):
                task.cancel()
                with suppress(asyncio.CancelledError, Exception):
                    await task

    def stream(self, asked: PlannedRequest, request: Request) -> StreamingResponse:
        """Stream the answer. Raises ServiceError if it cannot start."""
        ticket = self._submit(asked, request)
        return _TicketResponse(self._write_events(asked, ticket), lambda: self.front.dispatcher.close(ticket), asked.timeout_seconds)

    def _submit(self, asked: PlannedRequest, request: Request) -> Ticket:
        ticket = self.front.dispatcher.submit(read_client(request.scope), asked.choices, asked.timeout_seconds, asked.priority)
        self.front.metrics.count_prompt(sum(map(len, asked.prompts)))
        return ticket

    async def _pieces(self, asked: PlannedRequest, ticket: Ticket) -> AsyncIterator[tuple[int, Piece]]:
        """Yield (choice index, next piece) until all choices have finished. Raises ServiceError."""
        num_open = len(asked.choices)
        while num_open:
            event = await ticket.events.get()
            if isinstance(event, ServiceError):
                raise event
            number, token = event
            if isinstance(token, PromptToken):
                asked.scored[number].append(token)
                continue
            text = asked.texts[number]
            if text.finish_reason:
                continue  # tokens in flight when a stop string was found
            piece = text.push(token) if asked.new_tokens else Piece("", (), "length")
            if piece.finish_reason:
                num_open -= 1
                if not token.finish_reason:
                    self.front.dispatcher.end_choice(ticket, number)
            yield number, piece

    async def _collect(self, asked: PlannedRequest, ticket: Ticket) -> bytes:
        pieces: list[list[Piece]] = [[] for _ in asked.choices]
        async for number, piece in self._pieces(asked, ticket):
            pieces[number].append(piece)

        def build() -> bytes:
            numbers = _choose_best(asked, pieces)
            choices = [self._build_choice(asked, number, pieces[number], len(asked.echo[number])) for number in numbers]
            for index, choice in enumerate(choices):
                choice["index"] = index
            answer = asked.naming.build(choices, self._count(asked), is_chunk=False)
            if asked.naming.is_chat:
                answer |= self._build_prompt_report(asked, 0)
            return msgspec.json.encode(answer)

        num_tokens = (sum(map(len, pieces)) if asked.logprobs is not None else 0) + sum(map(len, asked.scored))
        return await _build_answer(num_tokens, build)

    async def _write_events(self, asked: PlannedRequest, ticket: Ticket) -> AsyncIterator[bytes]:
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
            async for number, piece in self._pieces(asked, ticket):
                has_text = piece.parts if asked.naming.is_chat else piece.text
                if not has_text and not piece.finish_reason and asked.logprobs is None and not asked.with_token_ids:
                    continue
                build = partial(self._build_chunk, asked, number, piece, offsets[number], call_ids[number], is_first=not begun[number])
                yield await _build_answer(0 if begun[number] else len(asked.scored[number]), build)
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


class _TicketResponse(StreamingResponse):
    """Event stream that releases its sequences when it ends, even if the client disconnected before it began."""

    def __init__(self, events: AsyncIterator[bytes], close: Callable[[], None], timeout_seconds: float) -> None:
        super().__init__(events, media_type="text/event-stream", headers=_SSE_HEADERS)
        self._close, self._timeout_seconds = close, timeout_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream. A client that stops reading is disconnected shortly after the deadline."""
        try:
            await asyncio.wait_for(super().__call__(scope, receive, send), self._timeout_seconds + _READING_SECONDS)
        except asyncio.TimeoutError:
            raise ConnectionError from None
        finally:
            self._close()


async def _build_answer(num_logprobs: int, build: Callable[[], bytes]) -> bytes:
    """Run `build`, in a thread if the log-probabilities of many tokens would block the event loop."""
    return await asyncio.to_thread(build) if num_logprobs > _LARGE_ANSWER else build()


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False, allow_nan=False).encode() + b"\n\n"


async def _wait_until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
