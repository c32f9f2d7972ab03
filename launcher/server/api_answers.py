"""Conversion of generated tokens to OpenAI response objects: incremental text, stop strings, log-probabilities, usage."""

import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from launcher.server.stop_search import StopSearch
from model.text.tokenizer import StreamDecoder, Tokenizer
from model.text.tool_calls import AnswerPart, CallArguments, CallStart, Reasoning, ReasoningReader, Text, ToolCallReader, ToolFormat

if TYPE_CHECKING:  # the text of an answer does not need PyTorch
    from launcher.server.inflight_requests import NewToken

_REASONS = {"eos": "stop", "length": "length"}
"""Maps the generator's finish reasons to OpenAI's."""


class AnswerReader:
    """Separates one chat answer into reasoning, text and tool calls."""

    def __init__(
        self,
        *,
        reasoning: ReasoningReader | None = None,
        tools: ToolFormat | None = None,
        named: str | None = None,
        max_calls: int | None = None,
    ) -> None:
        """`reasoning`: if the model writes any. `tools`: the form of tool calls in the text. `named`: the function whose arguments are the
        whole text. `max_calls`: further calls are dropped."""
        self._max_calls, self._num_calls = max_calls, 0
        self._reasoning, self._tools, self._named = reasoning, ToolCallReader(tools) if tools is not None else None, named
        self._has_begun = False

    def push(self, text: str, *, is_end: bool) -> tuple[AnswerPart, ...]:
        """Return the parts that the next text completes."""
        parts: list[AnswerPart] = []
        if self._reasoning is not None:
            thought, text = self._reasoning.push(text, is_end=is_end)
            parts += [Reasoning(thought)] if thought else []
        if self._named is not None:
            parts += [] if self._has_begun else [CallStart(self._named)]
            self._has_begun = True
            return (*parts, CallArguments(text))
        if self._tools is None:
            return (*parts, Text(text)) if text else tuple(parts)
        return (*parts, *(part for part in self._tools.push(text, is_end=is_end) if self._keeps(part)))

    def _keeps(self, part: AnswerPart) -> bool:
        self._num_calls += isinstance(part, CallStart)
        is_call = isinstance(part, CallStart | CallArguments)
        return not is_call or self._max_calls is None or self._num_calls <= self._max_calls

    @property
    def has_calls(self) -> bool:
        """Whether the model decided to call tools."""
        return self._tools is not None and self._tools.num_calls > 0


@dataclass(frozen=True, slots=True)
class Piece:
    """The contribution of one token to an answer."""

    text: str
    tokens: "tuple[NewToken, ...]"
    """The tokens whose log-probabilities this piece carries."""
    finish_reason: str | None
    """"stop", "length" or "tool_calls" on the last piece, otherwise None."""
    parts: tuple[AnswerPart, ...] = ()
    """The text, separated into parts, for a chat."""
    stop_reason: str | int | None = None
    """The stop string or stop token id of the request that ended the answer."""


class ChoiceText:
    """Incremental text of one answer, up to the first stop string."""

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], rules: "TextRules", reader: AnswerReader | None = None) -> None:
        self._tokenizer, self._prompt_ids, self._rules, self._reader = tokenizer, prompt_ids, rules, reader
        self._search = StopSearch(rules.stops, keeps_stop=rules.keeps_stop)
        self._decoder: StreamDecoder | None = None
        self.num_tokens = 0
        self.finish_reason: str | None = None

    def push(self, token: "NewToken") -> Piece:
        """Add the next token and return the resulting piece."""
        self.num_tokens += 1
        if self._decoder is None:  # created lazily: a request with many sequences may be queued for long, or rejected
            self._decoder = StreamDecoder(self._tokenizer, self._prompt_ids)
        rules, token_id = self._rules, token.token_id
        stops_here = token.finish_reason == "eos" and token_id in rules.stop_token_ids
        if not stops_here or rules.keeps_stop:
            self._search.add(self._decoder.push(token_id))
        if token_id in self._tokenizer.special_ids:
            is_last = token.finish_reason == "eos" and not rules.keeps_stop
            self._search.add(token_text(self._tokenizer, token_id), shown=token_id in rules.shown_ids and not is_last)
        reason = _REASONS[token.finish_reason] if token.finish_reason else None
        if reason:
            self._search.add(self._decoder.finish())
        text, is_stopped = self._search.take(is_end=reason is not None)
        reason = "stop" if is_stopped else reason
        parts = self._reader.push(text, is_end=reason is not None) if self._reader is not None else ()
        if reason == "stop" and self._reader is not None and self._reader.has_calls:
            reason = "tool_calls"
        self.finish_reason = reason
        stop_reason = self._search.found if is_stopped else token_id if stops_here else None
        return Piece(text, (token,), reason, parts, stop_reason)


@dataclass(frozen=True, slots=True, kw_only=True)
class TextRules:
    """What of an answer's tokens becomes its text."""

    stops: Sequence[str] = ()
    """Stop strings."""
    stop_token_ids: frozenset[int] = frozenset()
    """Stop token ids of the request, without the model's own."""
    keeps_stop: bool = False
    """Whether the stop string or token is part of the text."""
    shown_ids: frozenset[int] = frozenset()
    """Special tokens that are part of the text."""


@dataclass(frozen=True, slots=True)
class Naming:
    """The fields shared by all response objects of one answer."""

    id: str
    model: str
    created: int
    is_chat: bool
    fingerprint: str

    @classmethod
    def new(cls, model: str, *, is_chat: bool, fingerprint: str) -> "Naming":
        """Create the fields for a new answer."""
        return cls(f"{'chatcmpl' if is_chat else 'cmpl'}-{uuid.uuid4().hex}", model, int(time.time()), is_chat, fingerprint)

    def build(self, choices: list[dict[str, Any]], usage: dict[str, int] | None, *, is_chunk: bool) -> dict[str, Any]:
        """Build the response object around its choices."""
        kind = ("chat.completion.chunk" if is_chunk else "chat.completion") if self.is_chat else "text_completion"
        head = {"id": self.id, "object": kind, "created": self.created, "model": self.model, "system_fingerprint": self.fingerprint}
        return {**head, "choices": choices, "usage": usage}


def build_message(parts: Iterable[AnswerPart], call_ids: "CallIds", *, is_delta: bool) -> dict[str, Any]:
    """Build a chat message, or one delta of a stream, from the parts of an answer."""
    text, reasoning, calls = "", "", list[dict[str, Any]]()
    for part in parts:
        match part:
            case Text():
                text += part.text
            case Reasoning():
                reasoning += part.text
            case CallStart():
                number, call_id = call_ids.take()
                calls.append({"index": number, "id": call_id, "type": "function", "function": {"name": part.name, "arguments": ""}})
            case CallArguments():
                if not calls:
                    calls.append({"index": call_ids.current, "function": {"arguments": ""}})
                calls[-1]["function"]["arguments"] += part.text
    message: dict[str, Any] = {} if is_delta else {"role": "assistant", "content": text or (None if calls else "")}
    if is_delta and (text or not (reasoning or calls)):
        message["content"] = text
    if reasoning:
        message["reasoning_content"] = reasoning
    if calls and is_delta:
        message["tool_calls"] = calls
    elif calls:
        message["tool_calls"] = [{key: value for key, value in call.items() if key != "index"} for call in calls]
    return message


class CallIds:
    """Ids of the tool calls of one choice."""

    def __init__(self, *, is_short: bool = False) -> None:
        """`is_short`: nine letters and digits, which Mistral's templates demand."""
        self._is_short = is_short
        self.current = -1
        """Number of the last call."""

    def take(self) -> tuple[int, str]:
        """Return number and id of a new call."""
        self.current += 1
        return self.current, uuid.uuid4().hex[:9] if self._is_short else f"call_{uuid.uuid4().hex}"


def build_prompt_logprobs(tokenizer: Tokenizer, prompt: "Sequence[NewToken]", top: int) -> list[dict[str, Any] | None]:
    """Build vLLM's `prompt_logprobs`: for each token but the first, log-probability and rank of it and the `top` most likely ones."""

    def entry(token_id: int, logprob: float, rank: int) -> dict[str, Any]:
        return {"logprob": logprob, "rank": rank, "decoded_token": token_text(tokenizer, token_id)}

    return [
        None
        if token.logprob is None
        else {
            str(token.token_id): entry(token.token_id, token.logprob, token.rank),
            **{str(other): entry(other, value, place) for place, (other, value) in enumerate(token.top_logprobs[:top], 1)},
        }
        for token in prompt
    ]


def build_usage(prompt_tokens: int, new_tokens: int) -> dict[str, int]:
    """Build OpenAI's `usage` object."""
    return {"prompt_tokens": prompt_tokens, "completion_tokens": new_tokens, "total_tokens": prompt_tokens + new_tokens}


def token_text(tokenizer: Tokenizer, token_id: int) -> str:
    """Decode a single token; incomplete UTF-8 becomes U+FFFD."""
    return tokenizer.token_bytes(token_id).decode(errors="replace")


def build_chat_logprobs(tokenizer: Tokenizer, tokens: "Sequence[NewToken]") -> dict[str, Any]:
    """Build `logprobs` for a chat choice."""

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        return {"token": token_text(tokenizer, token_id), "logprob": logprob, "bytes": list(tokenizer.token_bytes(token_id))}

    return {
        "content": [
            {**entry(t.token_id, t.logprob or 0.0), "top_logprobs": [entry(i, value) for i, value in t.top_logprobs]} for t in tokens
        ],
        "refusal": None,
    }


def build_text_logprobs(tokenizer: Tokenizer, prompt: "Sequence[NewToken]", tokens: "Sequence[NewToken]", offset: int) -> dict[str, Any]:
    """Build `logprobs` for a completion choice: echoed prompt first, then new tokens, whose text starts at character `offset`."""
    # Special tokens contribute no characters to an echo.
    widths = [0 if t.token_id in tokenizer.special_ids else len(token_text(tokenizer, t.token_id)) for t in prompt]
    widths += [len(token_text(tokenizer, t.token_id)) for t in tokens]
    offsets = [*accumulate(widths[: len(prompt)], initial=0)][: len(prompt)] + [*accumulate(widths[len(prompt) :], initial=offset)][:-1]
    return {
        "tokens": [token_text(tokenizer, t.token_id) for t in (*prompt, *tokens)],
        "token_logprobs": [t.logprob for t in (*prompt, *tokens)],
        # Several token ids can decode to the same text, such as partial characters; keep the most likely one.
        "top_logprobs": [
            {token_text(tokenizer, i): value for i, value in sorted(t.top_logprobs, key=lambda one: one[1])} or None
            for t in (*prompt, *tokens)
        ],
        "text_offset": offsets,
    }
