"""Completion and chat answers, complete or streamed: plans a request, queues it, follows its tokens, and builds OpenAI objects.

Routes and error responses are in `launcher/server/app.py`.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any

from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from launcher.server.api_answers import Piece
from launcher.server.chat_prompts import ChatPrompts
from launcher.server.chat_rendering import ChatRenderer
from launcher.server.completion_writer import AnswerWriter, build_answer
from launcher.server.engine_client import EngineClient
from launcher.server.errors import ServiceError, client_gone
from launcher.server.guard import read_client
from launcher.server.inflight_requests import PromptToken
from launcher.server.queue import Ticket
from launcher.server.request_planner import PlannedRequest, RequestPlanner
from launcher.server.request_threads import RequestThreads
from launcher.server.responses_requests import ResponsesRequest
from model.text.tokenizer import Tokenizer

_READING_SECONDS = 30.0
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
        self.front, self.tokenizer, self._chat = front, tokenizer, chat
        prompts = ChatPrompts(chat, tool_call_parser)
        self._planner = RequestPlanner(front, tokenizer, prompts, max_seconds, strict_fields=strict_fields)
        self._threads = RequestThreads()

    @property
    def system_prompt(self) -> str | None:
        """The system prompt that the chat template adds where a conversation has none."""
        return self._chat.system_prompt

    async def plan_completion(self, body: bytes) -> PlannedRequest:
        """Parse and plan a completion request. Raises ServiceError, RequestError."""
        return await self._threads.run(body, self._planner.plan_completion)

    async def plan_chat(self, body: bytes) -> PlannedRequest:
        """Parse and plan a chat completion request. Raises ServiceError, RequestError."""
        return await self._threads.run(body, self._planner.plan_chat, is_chat=True)

    async def plan_response(self, body: bytes) -> tuple[ResponsesRequest, PlannedRequest]:
        """Parse and plan a request of /v1/responses. Raises ServiceError, RequestError."""
        return await self._threads.run(body, self._planner.plan_response, is_chat=True)

    async def plan_message(self, body: bytes) -> PlannedRequest:
        """Parse and plan a request of /v1/messages. Raises ServiceError, RequestError."""
        return await self._threads.run(body, self._planner.plan_message, is_chat=True)

    async def tokenize(self, body: bytes) -> dict[str, Any]:
        """Answer a request of /tokenize. Raises ServiceError, RequestError."""
        return await self._threads.run(body, self._planner.tokenize, is_chat=True)

    async def detokenize(self, body: bytes) -> dict[str, Any]:
        """Answer a request of /detokenize. Raises ServiceError, RequestError."""
        return await self._threads.run(body, self._planner.detokenize)

    def check_model(self, name: str) -> None:
        """Raise ServiceError if the requested model is neither the served one nor an adapter."""
        self._planner.check_model(name)

    def close(self) -> None:
        """Stop reading requests and terminate the template process."""
        self._threads.close()
        self._chat.close()

    async def run(self, asked: PlannedRequest, request: Request, writer: AnswerWriter) -> bytes:
        """Return the complete answer as JSON. Raises ServiceError."""
        ticket = self._submit(asked, request)
        gone = asyncio.create_task(_wait_until_gone(request))
        work = asyncio.create_task(self._collect(asked, ticket, writer))
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

    async def complete(self, asked: PlannedRequest, writer: AnswerWriter, caller: str) -> bytes:
        """Return the complete answer to a request that did not come over HTTP. Raises ServiceError."""
        ticket = self.front.dispatcher.submit(caller, asked.choices, asked.timeout_seconds, asked.priority, asked.adapter)
        try:
            return await self._collect(asked, ticket, writer)
        finally:
            self.front.dispatcher.close(ticket)

    def stream(self, asked: PlannedRequest, request: Request, writer: AnswerWriter) -> StreamingResponse:
        """Stream the answer. Raises ServiceError if it cannot start."""
        ticket = self._submit(asked, request)
        return _TicketResponse(
            writer.write_events(asked, self._pieces(asked, ticket)), lambda: self.front.dispatcher.close(ticket), asked.timeout_seconds
        )

    def _submit(self, asked: PlannedRequest, request: Request) -> Ticket:
        client = read_client(request.scope)
        ticket = self.front.dispatcher.submit(client, asked.choices, asked.timeout_seconds, asked.priority, asked.adapter)
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

    async def _collect(self, asked: PlannedRequest, ticket: Ticket, writer: AnswerWriter) -> bytes:
        pieces: list[list[Piece]] = [[] for _ in asked.choices]
        async for number, piece in self._pieces(asked, ticket):
            pieces[number].append(piece)
        num_tokens = (sum(map(len, pieces)) if asked.logprobs is not None else 0) + sum(map(len, asked.scored))
        return await build_answer(num_tokens, lambda: writer.build(asked, pieces))


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


async def _wait_until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
