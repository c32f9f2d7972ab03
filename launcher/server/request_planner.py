"""Conversion of request bytes to token ids and sampling parameters: fields, chat template, tokenizer, and context limits.

Runs in the threads of `launcher/server/request_threads.py`.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from launcher.server.api_answers import ChoiceText, Naming
from launcher.server.api_requests import DEFAULT_COMPLETION_TOKENS, MAX_PROMPT_LOGPROBS, ChatRequest, CompletionRequest, Message
from launcher.server.bounded_log import OnceLog
from launcher.server.chat_rendering import ChatRenderer
from launcher.server.engine_client import EngineClient
from launcher.server.errors import ServiceError
from launcher.server.inflight_requests import NewToken
from launcher.server.request_body import BodyReader
from model.engine.request import Request, check_length, check_memory, check_request
from model.engine.sampling import SamplingParams
from model.text.tokenizer import Tokenizer
from parallel.errors import RequestError


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedRequest:
    """One planned request, as text and token ids."""

    naming: Naming
    prompts: Sequence[tuple[int, ...]]
    choices: Sequence[tuple[tuple[int, ...], SamplingParams]]
    """Token ids and sampling parameters of each choice; n choices per prompt."""
    texts: Sequence[ChoiceText]
    echo: Sequence[str]
    """Echoed text that precedes each choice."""
    scored: Sequence[list[NewToken]]
    """Prompt tokens of each choice received so far, if their log-probabilities are echoed."""
    new_tokens: int
    """Maximum new tokens per choice; 0 evaluates only the prompt."""
    with_logprobs: bool
    with_usage: bool
    is_stream: bool
    timeout_seconds: float


class RequestPlanner:
    """Plans the requests of one server."""

    def __init__(self, front: EngineClient, tokenizer: Tokenizer, chat: ChatRenderer, max_seconds: float, *, strict_fields: bool) -> None:
        """`max_seconds` caps the deadline of a request. `strict_fields` rejects unknown fields instead of ignoring them."""
        self._front, self._tokenizer, self._chat, self._max_seconds = front, tokenizer, chat, max_seconds
        self._fingerprint = f"tandem-{front.served.version}"
        self._unknown_fields = OnceLog()
        note = None if strict_fields else self._note_unknown
        self._completions, self._chats = BodyReader(CompletionRequest, note), BodyReader(ChatRequest, note)

    def plan_completion(self, raw: bytes) -> PlannedRequest:
        """Plan a completion. Raises ServiceError, RequestError."""
        body = self._completions.read(raw)
        self.check_model(body.model)
        self._front.dispatcher.check_count(len(body.prompts) * body.n)
        prompts = self._encode(body.prompts)
        new_tokens = DEFAULT_COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
        return self._plan(body, prompts, new_tokens, body.logprobs, has_echo=body.echo, is_chat=False)

    def plan_chat(self, raw: bytes) -> PlannedRequest:
        """Plan a chat completion. Raises ServiceError, RequestError."""
        body = self._chats.read(raw)
        self.check_model(body.model)
        (ids,) = self._encode([self._render(body.messages)], add_special_tokens=False)
        limit = body.max_completion_tokens or body.max_tokens
        new_tokens = limit or max(1, self._room - len(ids))
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        return self._plan(body, [ids], new_tokens, logprobs, has_echo=False, is_chat=True)

    def _render(self, messages: Sequence[Message]) -> str:
        """Render the prompt of a conversation. Raises RequestError if the template rejects it or would drop tool calls."""
        sent = [message.to_template() for message in messages]
        text = self._chat.render(sent)
        if not any("tool_calls" in message for message in sent) or self._chat.render(_drop_tool_calls(sent)) != text:
            return text
        # Some templates look for tool calls only if the content is null; most others fail on null.
        nulls = [{**message, "content": message["content"] or None} if "tool_calls" in message else message for message in sent]
        with suppress(RequestError):
            text = self._chat.render(nulls)
            if self._chat.render(_drop_tool_calls(nulls)) != text:
                return text
        place = next(number for number, message in enumerate(sent) if "tool_calls" in message)
        raise RequestError(f"messages.{place}: tool_calls are not supported by the chat template of this model; leave them out")

    def _note_unknown(self, name: str, hint: str) -> None:
        words = f"unknown field {name!r} in a request is ignored{hint} (reported once; --strict-fields refuses such requests)"
        self._unknown_fields.report(name, f"warning: {words}")

    def _plan(
        self,
        body: CompletionRequest | ChatRequest,
        prompts: Sequence[tuple[int, ...]],
        new_tokens: int,
        logprobs: int | None,
        *,
        has_echo: bool,
        is_chat: bool,
    ) -> PlannedRequest:
        served, is_scored = self._front.served, has_echo and logprobs is not None
        choices: list[tuple[tuple[int, ...], SamplingParams]] = []
        for number, ids in enumerate(prompts):
            all_params = body.plan_sampling(max(1, new_tokens), logprobs, prompt_logprobs=is_scored)
            token_request = Request(number, ids, all_params[0])  # the choices of a prompt differ only in their seeds
            check_request(token_request, served.job.context_tokens, served.config.vocab_size)
            check_memory(token_request, served.num_blocks, served.job.block_size)
            choices.extend((ids, params) for params in all_params)
        unknown = next((token for _, params in choices for token, _ in params.logit_bias if token >= served.config.vocab_size), None)
        if unknown is not None:
            raise RequestError(f"logit_bias names id {unknown}, but the vocabulary has {served.config.vocab_size}")
        num_scored = (1 + (logprobs or 0)) * body.n * sum(map(len, prompts)) if is_scored else 0
        if num_scored > MAX_PROMPT_LOGPROBS:
            words = f"{num_scored} log-probabilities of prompts, but the maximum is {MAX_PROMPT_LOGPROBS}: send fewer prompts"
            raise RequestError(f"echo with logprobs requests {words}")
        echo = [self._tokenizer.decode(ids) if has_echo else "" for ids in prompts]
        return PlannedRequest(
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

    def _encode(self, prompts: Sequence[str | list[int]], add_special_tokens: bool = True) -> list[tuple[int, ...]]:
        """Tokenize texts; token ids pass through. Raises RequestError for a text that is too long to tokenize or not valid Unicode."""

        return [self._encode_one(number, one, add_special_tokens) for number, one in enumerate(prompts)]

    def _encode_one(self, number: int, prompt: str | list[int], add_special_tokens: bool) -> tuple[int, ...]:
        if not isinstance(prompt, str):
            return tuple(prompt)
        try:
            size = len(prompt.encode())
        except UnicodeEncodeError:
            raise RequestError("the text holds a lone surrogate, which is not a character") from None
        # Reject by the longest possible token first: tokenizing an oversized text would take seconds.
        room = self._room
        if size > room and size > (most := room * self._longest_token):
            words = f"{most}: {room} tokens of at most {self._longest_token} bytes each"
            raise RequestError(f"prompt {number} has {size} bytes, but this model can take at most {words}")
        ids = tuple(self._tokenizer.encode(prompt, add_special_tokens))
        check_length(number, len(ids), self._front.served.job.context_tokens)  # before the next one is tokenized
        return ids

    @cached_property
    def _longest_token(self) -> int:
        """Length of the longest token of the vocabulary, in bytes."""
        return max((len(self._tokenizer.token_bytes(token_id)) for token_id in range(self._tokenizer.vocab_size)), default=1) or 1

    @property
    def _room(self) -> int:
        """Maximum number of tokens of a sequence."""
        served = self._front.served
        return min(served.job.context_tokens, served.num_blocks * served.job.block_size + 1)

    def check_model(self, name: str | None) -> None:
        """Raise ServiceError if the requested model is not the served one."""
        known = self._front.served.name
        if name is not None and name != known:
            raise ServiceError(404, f"the model {name[:100]!r} is not served here; {known!r} is", param="model", code="model_not_found")


def _drop_tool_calls(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in message.items() if key != "tool_calls"} for message in messages]
