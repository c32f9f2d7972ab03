"""The messages of a conversation, and prompts for the next answer that fit the model's context."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from model.text.tokenizer import Tokenizer
from parallel.errors import RequestError

_LEAST_ANSWER_TOKENS = 256
"""Old messages are dropped when less room than this is left for the answer; in a short context, less than a quarter of it."""


class Turn(NamedTuple):
    """A rendered prompt."""

    prompt_ids: tuple[int, ...]
    room: int
    """Tokens left for the answer."""
    num_dropped: int
    """Old messages dropped because they do not fit."""


class Conversation:
    """One conversation with a model."""

    def __init__(
        self,
        render: Callable[[Sequence[dict[str, Any]]], str],
        tokenizer: Tokenizer,
        context_tokens: int,
        system: str | None = None,
    ) -> None:
        """`render` turns messages into prompt text."""
        self._render, self._tokenizer, self._context_tokens = render, tokenizer, context_tokens
        self._system = [{"role": "system", "content": system}] if system else []
        self._messages: list[dict[str, str]] = []

    def plan(self, text: str) -> Turn:
        """Return the prompt for an answer to `text`. Raises RequestError if the message alone does not fit the context."""
        least = min(_LEAST_ANSWER_TOKENS, self._context_tokens // 4)
        question = {"role": "user", "content": text}
        ids: tuple[int, ...] = ()
        for num_dropped in range(0, len(self._messages) + 1, 2):
            rendered = self._render([*self._system, *self._messages[num_dropped:], question])
            ids = tuple(self._tokenizer.encode(rendered, add_special_tokens=False))
            if len(ids) + least <= self._context_tokens:
                return Turn(ids, self._context_tokens - len(ids), num_dropped)
        room = self._context_tokens - len(ids)
        if room < 1:
            raise RequestError(
                f"the message has {len(ids)} tokens with its template, but the context is {self._context_tokens}: shorten it"
            )
        return Turn(ids, room, len(self._messages))

    def add(self, text: str, answer: str, num_dropped: int = 0) -> None:
        """Append a message and its answer; drop the first `num_dropped` messages."""
        del self._messages[:num_dropped]
        self._messages += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]

    def reset(self) -> None:
        """Start over, keeping the system message."""
        self._messages.clear()
