"""One call of a server from its text to its answer, whole or piece by piece, in OpenAI's objects.

Knows texts, the tokenizer and the dispatcher; routes and their errors are `launcher/http_app.py`'s.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from launcher.api_answers import ChoiceText, Naming, Piece, build_chat_logprobs, build_text_logprobs, build_usage, token_text
from launcher.api_requests import DEFAULT_COMPLETION_TOKENS, ChatRequest, CompletionRequest, Message
from launcher.bounded_log import OnceLog
from launcher.dispatch import Ticket
from launcher.http_guard import read_client
from launcher.journal import NewToken, PromptToken
from launcher.request_body import BodyReader
from launcher.request_threads import RequestThreads
from launcher.serve_front import ServeFront
from launcher.service_errors import ServiceError, caller_gone
from model.chat import ChatTemplate
from model.request import Request as TokenRequest
from model.request import check_length, check_memory, check_request
from model.sampling import SamplingParams
from model.tokenizer import Tokenizer
from parallel.errors import RequestError

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
    scored: Sequence[list[NewToken]]
    """Prompt of each choice, as far as its log-probabilities have come, where they go with the echo."""
    new_tokens: int
    """Tokens of a choice at most; 0: only its prompt is of interest."""
    with_logprobs: bool
    with_usage: bool
    is_stream: bool
    timeout_seconds: float


class Service:
    """What the routes share."""

    def __init__(
        self, front: ServeFront, tokenizer: Tokenizer, template: ChatTemplate, max_seconds: float, *, strict_fields: bool = False
    ) -> None:
        """`max_seconds`: the longest deadline of a request. `strict_fields`: refuse unknown fields instead of ignoring them."""
        self.front, self._tokenizer, self._template, self._max_seconds = front, tokenizer, template, max_seconds
        self._fingerprint = f"tandem-{front.served.version}"
        self._threads = RequestThreads()
        self._unknown_fields = OnceLog()
        note = None if strict_fields else self._note_unknown
        self._completions, self._chats = BodyReader(CompletionRequest, note), BodyReader(ChatRequest, note)

    async def plan_completion(self, body: bytes) -> Asked:
        """What a completion asks for. Raises ServiceError, RequestError."""
        return await self._threads.run(body, self._plan_completion)

    async def plan_chat(self, body: bytes) -> Asked:
        """What a chat completion asks for. Raises ServiceError, RequestError."""
        return await self._threads.run(body, self._plan_chat)

    def close(self) -> None:
        """Read no further request."""
        self._threads.close()

    def _plan_completion(self, raw: bytes) -> Asked:
        body = self._completions.read(raw)
        self.check_model(body.model)
        self.front.dispatcher.check_count(len(body.prompts) * body.n)
        prompts = self._encode(body.prompts)
        new_tokens = DEFAULT_COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
        return self._plan(body, prompts, new_tokens, body.logprobs, has_echo=body.echo, is_chat=False)

    def _plan_chat(self, raw: bytes) -> Asked:
        body = self._chats.read(raw)
        self.check_model(body.model)
        (ids,) = self._encode([self._render(body.messages)], add_special_tokens=False)
        limit = body.max_completion_tokens or body.max_tokens
        new_tokens = limit or max(1, self._room - len(ids))
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        return self._plan(body, [ids], new_tokens, logprobs, has_echo=False, is_chat=True)

    def _render(self, messages: Sequence[Message]) -> str:
        """The prompt of a conversation. Raises RequestError where the template refuses it or would drop tool calls."""
        sent = [message.to_template() for message in messages]
        text = self._render_one(sent)
        if not any("tool_calls" in message for message in sent) or self._render_one(_drop_tool_calls(sent)) != text:
            return text
        # Some templates look for tool calls only where the content is null; most others fail on null.
        nulls = [{**message, "content": message["content"] or None} if "tool_calls" in message else message for message in sent]
        with suppress(RequestError):
            text = self._render_one(nulls)
            if self._render_one(_drop_tool_calls(nulls)) != text:
                return text
        place = next(number for number, message in enumerate(sent) if "tool_calls" in message)
        raise RequestError(f"messages.{place}: tool_calls are not supported by the chat template of this model; leave them out")

    def _render_one(self, messages: Sequence[dict[str, Any]]) -> str:
        try:
            return self._template.render(messages)
        except RequestError:
            raise
        except Exception as error:  # a template is a program of the checkpoint's author: any error can come of it
            words = f"{type(error).__name__}: {str(error)[:200]}"
            raise RequestError(f"the chat template of this model does not take these messages ({words})") from None

    def _note_unknown(self, name: str, hint: str) -> None:
        words = f"unknown field {name!r} in a request is ignored{hint} (reported once; --strict-fields refuses such requests)"
        self._unknown_fields.report(name, f"warning: {words}")

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
        *,
        has_echo: bool,
        is_chat: bool,
    ) -> Asked:
        served, is_scored = self.front.served, has_echo and logprobs is not None
        choices: list[tuple[tuple[int, ...], SamplingParams]] = []
        for number, ids in enumerate(prompts):
            all_params = body.plan_sampling(max(1, new_tokens), logprobs, prompt_logprobs=is_scored)
            token_request = TokenRequest(number, ids, all_params[0])  # the choices of a prompt differ in their seeds only
            check_request(token_request, served.job.context_tokens, served.config.vocab_size)
            check_memory(token_request, served.num_blocks, served.job.block_size)
            choices.extend((ids, params) for params in all_params)
        unknown = next((token for _, params in choices for token, _ in params.logit_bias if token >= served.config.vocab_size), None)
        if unknown is not None:
            raise RequestError(f"logit_bias names id {unknown}, but the vocabulary has {served.config.vocab_size}")
        echo = [self._tokenizer.decode(ids) if has_echo else "" for ids in prompts]
        return Asked(
            naming=Naming.new(served.name, is_chat=is_chat, fingerprint=self._fingerprint),
            prompts=prompts,
            choices=choices,
            texts=[ChoiceText(self._tokenizer, ids, body.stops) for ids, _ in choices],
            echo=[text for text in echo for _ in range(body.n)],
            scored=[[NewToken(ids[0], None, None, ())] if is_scored else [] for ids, _ in choices],
            new_tokens=new_tokens,
            with_logprobs=logprobs is not None,
            with_usage=body.includes_usage,
            is_stream=body.stream,
            timeout_seconds=min(body.timeout or self._max_seconds, self._max_seconds),
        )

    def _submit(self, asked: Asked, request: Request) -> Ticket:
        ticket = self.front.dispatcher.submit(read_client(request.scope), asked.choices, asked.timeout_seconds)
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
            if isinstance(token, PromptToken):
                asked.scored[number].append(token)
                continue
            text = asked.texts[number]
            if text.finish_reason:
                continue  # what was on its way when a stop text was found
            piece = text.push(token) if asked.new_tokens else Piece("", (), "length")
            if piece.finish_reason:
                num_open -= 1
                if not token.finish_reason:
                    self.front.dispatcher.end_choice(ticket, number)
            yield number, piece

    async def _collect(self, asked: Asked, ticket: Ticket) -> dict[str, Any]:
        pieces: list[list[Piece]] = [[] for _ in asked.choices]
        async for number, piece in self._pieces(asked, ticket):
            pieces[number].append(piece)
        choices = [self._build_choice(asked, number, some, len(asked.echo[number])) for number, some in enumerate(pieces)]
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
                scored = asked.scored[number] if is_first else []
                choice["logprobs"] = build_text_logprobs(self._tokenizer, scored, tokens, offset)
        return choice

    def _count(self, asked: Asked) -> dict[str, int]:
        return build_usage(sum(map(len, asked.prompts)), sum(text.num_tokens for text in asked.texts))

    def _encode(self, prompts: Sequence[str | list[int]], add_special_tokens: bool = True) -> list[tuple[int, ...]]:
        """Ids of texts; ids stay as they are. Raises RequestError for a text that is too long to be tokenized, or not Unicode."""

        return [self._encode_one(number, one, add_special_tokens) for number, one in enumerate(prompts)]

    def _encode_one(self, number: int, prompt: str | list[int], add_special_tokens: bool) -> tuple[int, ...]:
        if not isinstance(prompt, str):
            return tuple(prompt)
        try:
            size = len(prompt.encode())
        except UnicodeEncodeError:
            raise RequestError("the text holds half of a surrogate pair, which is no character") from None
        # A text has no fewer tokens than its longest possible token allows; counting them would take seconds.
        room = self._room
        if size > room and size > (most := room * self._longest_token):
            words = f"{most}: {room} tokens of at most {self._longest_token} bytes each"
            raise RequestError(f"prompt {number} has {size} bytes, but this model can take at most {words}")
        ids = tuple(self._tokenizer.encode(prompt, add_special_tokens))
        check_length(number, len(ids), self.front.served.job.context_tokens)  # before the next one is tokenized
        return ids

    @cached_property
    def _longest_token(self) -> int:
        """Bytes of the longest token of the vocabulary."""
        return max((len(self._tokenizer.token_bytes(token_id)) for token_id in range(self._tokenizer.vocab_size)), default=1) or 1

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


def _drop_tool_calls(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in message.items() if key != "tool_calls"} for message in messages]


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False).encode() + b"\n\n"


async def _wait_until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
