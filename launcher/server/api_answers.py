"""From the tokens of an answer to OpenAI's objects: text as it grows, stop texts, log-probabilities, usage.

Knows a tokenizer and JSON; nothing of HTTP and of who asks.
"""

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from launcher.server.inflight_requests import NewToken
from model.text.tokenizer import StreamDecoder, Tokenizer

_REASONS = {"eos": "stop", "length": "length"}
"""The generator's words: OpenAI's."""


@dataclass(frozen=True, slots=True)
class Piece:
    """What one token adds to an answer."""

    text: str
    tokens: tuple[NewToken, ...]
    """Whose log-probabilities come with it."""
    finish_reason: str | None
    """stop or length with the last piece."""


class ChoiceText:
    """The text of one answer as its tokens come. What may become a stop text is held back until that is known."""

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], stops: Sequence[str]) -> None:
        self._tokenizer, self._prompt_ids, self._stops = tokenizer, prompt_ids, tuple(stops)
        self._decoder: StreamDecoder | None = None
        self._held = ""
        self.num_tokens = 0
        self.finish_reason: str | None = None

    def push(self, token: NewToken) -> Piece:
        """The piece that comes with the next token."""
        self.num_tokens += 1
        if self._decoder is None:  # not before: a call of many sequences may wait for long, or be refused
            self._decoder = StreamDecoder(self._tokenizer, self._prompt_ids)
        self._held += self._decoder.push(token.token_id)
        reason = _REASONS[token.finish_reason] if token.finish_reason else None
        if reason:
            self._held += self._decoder.finish()
        # The one that is complete first, whatever the tokens are; of several the longest.
        found = min(((place + len(stop), place) for stop in self._stops if (place := self._held.find(stop)) >= 0), default=None)
        if found is not None:
            text, self._held, reason = self._held[: found[1]], "", "stop"
        else:
            keep = 0 if reason else self._count_held()
            text = self._held[: len(self._held) - keep]
            self._held = self._held[len(text) :]
        self.finish_reason = reason
        return Piece(text, (token,), reason)

    def _count_held(self) -> int:
        """Characters at the end with which a stop text begins."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        return next(
            (
                size
                for size in range(min(longest, len(self._held)), 0, -1)
                if any(stop.startswith(self._held[-size:]) for stop in self._stops)
            ),
            0,
        )


@dataclass(frozen=True, slots=True)
class Naming:
    """What all objects of one answer say of themselves."""

    id: str
    model: str
    created: int
    is_chat: bool
    fingerprint: str

    @classmethod
    def new(cls, model: str, *, is_chat: bool, fingerprint: str) -> "Naming":
        """For an answer that begins now."""
        return cls(f"{'chatcmpl' if is_chat else 'cmpl'}-{uuid.uuid4().hex}", model, int(time.time()), is_chat, fingerprint)

    def build(self, choices: list[dict[str, Any]], usage: dict[str, int] | None, *, is_chunk: bool) -> dict[str, Any]:
        """The object, with its choices."""
        kind = ("chat.completion.chunk" if is_chunk else "chat.completion") if self.is_chat else "text_completion"
        head = {"id": self.id, "object": kind, "created": self.created, "model": self.model, "system_fingerprint": self.fingerprint}
        return {**head, "choices": choices, "usage": usage}


def build_usage(prompt_tokens: int, new_tokens: int) -> dict[str, int]:
    """OpenAI's count."""
    return {"prompt_tokens": prompt_tokens, "completion_tokens": new_tokens, "total_tokens": prompt_tokens + new_tokens}


def token_text(tokenizer: Tokenizer, token_id: int) -> str:
    """The text of one token by itself; bytes that spell no character become U+FFFD."""
    return tokenizer.token_bytes(token_id).decode(errors="replace")


def build_chat_logprobs(tokenizer: Tokenizer, tokens: Sequence[NewToken]) -> dict[str, Any]:
    """`logprobs` of a chat choice."""

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        return {"token": token_text(tokenizer, token_id), "logprob": logprob, "bytes": list(tokenizer.token_bytes(token_id))}

    return {
        "content": [
            {**entry(t.token_id, t.logprob or 0.0), "top_logprobs": [entry(i, value) for i, value in t.top_logprobs]} for t in tokens
        ],
        "refusal": None,
    }


def build_text_logprobs(tokenizer: Tokenizer, tokens: Sequence[NewToken], offset: int) -> dict[str, Any]:
    """`logprobs` of a completion's choice; `offset`: characters of the tokens before these."""
    texts = [token_text(tokenizer, t.token_id) for t in tokens]
    offsets = [offset + sum(map(len, texts[:place])) for place in range(len(texts))]
    return {
        "tokens": texts,
        "token_logprobs": [t.logprob for t in tokens],
        # Several ids may have one text, as parts of characters have: the likeliest of them counts.
        "top_logprobs": [
            {token_text(tokenizer, i): value for i, value in sorted(t.top_logprobs, key=lambda one: one[1])} or None for t in tokens
        ],
        "text_offset": offsets,
    }
