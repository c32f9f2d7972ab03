"""One call of a server from its text to its answer, whole or piece by piece, in OpenAI's objects.

Knows texts, the tokenizer and the dispatcher; routes and their errors are `launcher/server/app.py`'s.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from launcher.server.api_answers import ChoiceText, Naming, Piece, build_chat_logprobs, build_text_logprobs, build_usage, token_text
from launcher.server.api_requests import DEFAULT_COMPLETION_TOKENS, ChatRequest, CompletionRequest
from launcher.server.engine_client import ServeFront
from launcher.server.errors import ServiceError, caller_gone
from launcher.server.guard import CALLER
from launcher.server.queue import Ticket
from model.engine.request import Request as TokenRequest
from model.engine.request import check_memory, check_request
from model.engine.sampling import SamplingParams
from model.text.chat_template import ChatTemplate
from model.text.tokenizer import Tokenizer
from parallel.errors import RequestError

_LONG_TEXT = 20_000
"""Characters from which a text is made ids in a thread of its own: other callers go on."""
_READING_SECONDS = 30.0
_SSE_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One call, as texts and ids."""

    naming: Naming
    prompts: Sequence[tuple[int, ...]]
    choices: Sequence[tuple[tuple[int, ...], SamplingParams]]
    """Ids and options of each choice; n of them for each prompt."""
    texts: Sequence[ChoiceText]
    echo: Sequence[str]
    """What stands before each choice's text."""
    with_logprobs: bool
    with_usage: bool
    timeout_seconds: float


class Service:
    """What the routes share."""

    def __init__(self, front: ServeFront, tokenizer: Tokenizer, template: ChatTemplate, max_seconds: float) -> None:
        """`max_seconds`: the longest deadline of a request."""
        self.front, self._tokenizer, self._template, self._max_seconds = front, tokenizer, template, max_seconds
        self._fingerprint = f"tandem-{front.served.version}"

    async def plan_completion(self, body: CompletionRequest) -> Asked:
        """What a completion asks. Raises ServiceError, RequestError."""
        self.check_model(body.model)
        self.front.dispatcher.check_count(len(body.prompts) * body.n)
        prompts = await self._encode(body.prompts)
        new_tokens = DEFAULT_COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
        echo = [self._tokenizer.decode(ids) if body.echo else "" for ids in prompts]
        return self._plan(body, prompts, new_tokens, body.logprobs, echo, is_chat=False)

    async def plan_chat(self, body: ChatRequest) -> Asked:
        """What a chat completion asks. Raises ServiceError, RequestError."""
        self.check_model(body.model)
        text = self._template.render([message.to_template() for message in body.messages])
        (ids,) = await self._encode([text], add_special_tokens=False)
        said = body.max_completion_tokens or body.max_tokens
        new_tokens = said or max(1, self._room - len(ids))
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        return self._plan(body, [ids], new_tokens, logprobs, [""], is_chat=True)

    async def run(self, asked: Asked, request: Request) -> dict[str, Any]:
        """The whole answer. Raises ServiceError."""
        ticket = self._submit(asked, request)
        gone = asyncio.create_task(_wait_until_gone(request))
        work = asyncio.create_task(self._collect(asked, ticket))
        try:
            await asyncio.wait((gone, work), return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                raise caller_gone()
            return work.result()
        finally:
            self.front.dispatcher.close(ticket)
            for task in (gone, work):
                task.cancel()
                with suppress(asyncio.CancelledError, Exception):
                    await task

    def stream(self, asked: Asked, request: Request) -> StreamingResponse:
        """The answer piece by piece. Raises ServiceError when it cannot begin."""
        ticket = self._submit(asked, request)
        return _TicketResponse(self._write_events(asked, ticket), lambda: self.front.dispatcher.close(ticket), asked.timeout_seconds)

    def _plan(
        self,
        body: CompletionRequest | ChatRequest,
        prompts: Sequence[tuple[int, ...]],
        new_tokens: int,
        logprobs: int | None,
        echo: Sequence[str],
        *,
        is_chat: bool,
    ) -> Asked:
        served = self.front.served
        choices: list[tuple[tuple[int, ...], SamplingParams]] = []
        for number, ids in enumerate(prompts):
            all_params = body.plan_sampling(new_tokens, logprobs)
            token_request = TokenRequest(number, ids, all_params[0])  # the choices of a prompt differ in their seeds only
            check_request(token_request, served.job.context_tokens, served.config.vocab_size)
            check_memory(token_request, served.num_blocks, served.job.block_size)
            choices.extend((ids, params) for params in all_params)
        unknown = next((token for _, params in choices for token, _ in params.logit_bias if token >= served.config.vocab_size), None)
        if unknown is not None:
            raise RequestError(f"logit_bias names id {unknown}, but the vocabulary has {served.config.vocab_size}")
        return Asked(
            naming=Naming.new(served.name, is_chat=is_chat, fingerprint=self._fingerprint),
            prompts=prompts,
            choices=choices,
            texts=[ChoiceText(self._tokenizer, ids, body.stops) for ids, _ in choices],
            echo=[text for text in echo for _ in range(body.n)],
            with_logprobs=logprobs is not None,
            with_usage=body.includes_usage,
            timeout_seconds=min(body.timeout or self._max_seconds, self._max_seconds),
        )

    def _submit(self, asked: Asked, request: Request) -> Ticket:
        caller = request.scope.get(CALLER) or (request.client.host if request.client else "")
        ticket = self.front.dispatcher.submit(caller, asked.choices, asked.timeout_seconds)
        self.front.metrics.count_prompt(sum(map(len, asked.prompts)))
        return ticket

    async def _pieces(self, asked: Asked, ticket: Ticket) -> AsyncIterator[tuple[int, Piece]]:
        """(number of the choice, its next piece), until all choices have ended. Raises ServiceError."""
        num_open = len(asked.choices)
        while num_open:
            event = await ticket.events.get()
            if isinstance(event, ServiceError):
                raise event
            number, token = event
            text = asked.texts[number]
            if text.finish_reason:
                continue  # what was on its way when a stop text was found
            piece = text.push(token)
            if piece.finish_reason:
                num_open -= 1
                if not token.finish_reason:
                    self.front.dispatcher.end_choice(ticket, number)
            yield number, piece

    async def _collect(self, asked: Asked, ticket: Ticket) -> dict[str, Any]:
        pieces: list[list[Piece]] = [[] for _ in asked.choices]
        async for number, piece in self._pieces(asked, ticket):
            pieces[number].append(piece)
        choices = [self._build_choice(asked, number, some, 0) for number, some in enumerate(pieces)]
        return asked.naming.build(choices, self._count(asked), is_chunk=False)

    async def _write_events(self, asked: Asked, ticket: Ticket) -> AsyncIterator[bytes]:
        offsets = [len(text) for text in asked.echo]
        begun = [False] * len(asked.choices)
        try:
            if asked.naming.is_chat:
                opening = [
                    {"index": number, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
                    for number in range(len(asked.choices))
                ]
                yield _event(asked.naming.build(opening, None, is_chunk=True))
            async for number, piece in self._pieces(asked, ticket):
                if not piece.text and not piece.finish_reason and not asked.with_logprobs:
                    continue
                choice = self._build_choice(asked, number, [piece], offsets[number], is_chunk=True, is_first=not begun[number])
                begun[number] = True
                offsets[number] += sum(len(token_text(self._tokenizer, token.token_id)) for token in piece.tokens)
                yield _event(asked.naming.build([choice], None, is_chunk=True))
            if asked.with_usage:
                yield _event(asked.naming.build([], self._count(asked), is_chunk=True))
            yield b"data: [DONE]\n\n"
        except ServiceError as error:
            yield _event(error.to_json())

    def _build_choice(
        self, asked: Asked, number: int, pieces: Sequence[Piece], offset: int, *, is_chunk: bool = False, is_first: bool = True
    ) -> dict[str, Any]:
        text = "".join(piece.text for piece in pieces)
        tokens = [token for piece in pieces for token in piece.tokens]
        choice: dict[str, Any] = {"index": number, "finish_reason": pieces[-1].finish_reason, "logprobs": None}
        if asked.naming.is_chat:
            choice["delta" if is_chunk else "message"] = {"content": text} if is_chunk else {"role": "assistant", "content": text}
            if asked.with_logprobs:
                choice["logprobs"] = build_chat_logprobs(self._tokenizer, tokens)
        else:
            choice["text"] = (asked.echo[number] if is_first else "") + text
            if asked.with_logprobs:
                choice["logprobs"] = build_text_logprobs(self._tokenizer, tokens, offset)
        return choice

    def _count(self, asked: Asked) -> dict[str, int]:
        return build_usage(sum(map(len, asked.prompts)), sum(text.num_tokens for text in asked.texts))

    async def _encode(self, prompts: Sequence[str | list[int]], add_special_tokens: bool = True) -> list[tuple[int, ...]]:
        """Ids of texts; what is given in ids stays as it is."""
        texts = [one for one in prompts if isinstance(one, str)]
        try:
            "".join(texts).encode()
        except UnicodeEncodeError:
            raise RequestError("the text holds half of a surrogate pair, which is no character") from None

        def encode() -> list[tuple[int, ...]]:
            return [tuple(self._tokenizer.encode(one, add_special_tokens) if isinstance(one, str) else one) for one in prompts]

        if sum(map(len, texts)) < _LONG_TEXT:
            return encode()
        return await asyncio.to_thread(encode)

    @property
    def _room(self) -> int:
        """Tokens that a sequence may have."""
        served = self.front.served
        return min(served.job.context_tokens, served.num_blocks * served.job.block_size + 1)

    def check_model(self, name: str | None) -> None:
        """Raise ServiceError for a model that is not served here."""
        known = self.front.served.name
        if name is not None and name != known:
            raise ServiceError(404, f"the model {name[:100]!r} is not served here; {known!r} is", param="model", code="model_not_found")


class _TicketResponse(StreamingResponse):
    """A stream of events that lets go of its sequences when it ends, even where the caller went before it began."""

    def __init__(self, events: AsyncIterator[bytes], close: Callable[[], None], timeout_seconds: float) -> None:
        super().__init__(events, media_type="text/event-stream", headers=_SSE_HEADERS)
        self._close, self._timeout_seconds = close, timeout_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it. A caller who does not read, so that nothing can be sent, is left soon after the deadline."""
        try:
            await asyncio.wait_for(super().__call__(scope, receive, send), self._timeout_seconds + _READING_SECONDS)
        except asyncio.TimeoutError:
            raise ConnectionError from None
        finally:
            self._close()


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False).encode() + b"\n\n"


async def _wait_until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
