"""Conversion of generated tokens to OpenAI response objects: incremental text, stop strings, log-probabilities, usage."""

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from launcher.server.stop_search import StopSearch
from model.text.tokenizer import StreamDecoder, Tokenizer

if TYPE_CHECKING:  # the text of an answer does not need PyTorch
    from launcher.server.inflight_requests import NewToken

_REASONS = {"eos": "stop", "length": "length"}
"""Maps the generator's finish reasons to OpenAI's."""


@dataclass(frozen=True, slots=True)
class Piece:
    """The contribution of one token to an answer."""

    text: str
    tokens: "tuple[NewToken, ...]"
    """The tokens whose log-probabilities this piece carries."""
    finish_reason: str | None
    """"stop" or "length" on the last piece, otherwise None."""


class ChoiceText:
    """Incremental text of one answer, up to the first stop string."""

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], stops: Sequence[str]) -> None:
        self._tokenizer, self._prompt_ids, self._search = tokenizer, prompt_ids, StopSearch(stops)
        self._decoder: StreamDecoder | None = None
        self.num_tokens = 0
        self.finish_reason: str | None = None

    def push(self, token: "NewToken") -> Piece:
        """Add the next token and return the resulting piece."""
        self.num_tokens += 1
        if self._decoder is None:  # created lazily: a request with many sequences may be queued for long, or rejected
            self._decoder = StreamDecoder(self._tokenizer, self._prompt_ids)
        self._search.add(self._decoder.push(token.token_id))
        if token.token_id in self._tokenizer.special_ids:
            self._search.add(token_text(self._tokenizer, token.token_id), shown=False)
        reason = _REASONS[token.finish_reason] if token.finish_reason else None
        if reason:
            self._search.add(self._decoder.finish())
        text, is_stopped = self._search.take(is_end=reason is not None)
        self.finish_reason = "stop" if is_stopped else reason
        return Piece(text, (token,), self.finish_reason)


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
