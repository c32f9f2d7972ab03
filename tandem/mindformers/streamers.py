"""Streamers for `generate`, with the interface of MindFormers' and transformers': `put` takes token ids, `end` finishes the text."""

from collections.abc import Iterator
from queue import SimpleQueue
from typing import Any, Protocol

import numpy as np

from model.text.tokenizer import LlamaTokenizer


class Streamer(Protocol):
    """What `generate` calls: first with the prompt, then with each new token."""

    def put(self, value: Any) -> None:
        """Take token ids."""

    def end(self) -> None:
        """Finish."""


class TextStreamer:
    """Prints the text of one sequence to standard output, word by word.

    `skip_prompt`: print only the continuation.
    """

    def __init__(self, tokenizer: LlamaTokenizer, skip_prompt: bool = False, skip_special_tokens: bool = True) -> None:
        self._tokenizer, self._skip_prompt, self._skip_special_tokens = tokenizer, skip_prompt, skip_special_tokens
        self._ids: list[int] = []
        self._num_shown = 0
        self._is_prompt = True

    def put(self, value: Any) -> None:
        """Print what these ids complete: up to the last space, so that a word that the next token continues is not cut."""
        self._ids += [int(token) for token in np.asarray(value).reshape(-1)]
        text = self._decode()
        if self._is_prompt:
            self._is_prompt = False
            if self._skip_prompt:
                self._num_shown = len(text)
                return
        stop = len(text) if text.endswith("\n") else text.rfind(" ") + 1
        if stop > self._num_shown:
            self.on_finalized_text(text[self._num_shown : stop])
            self._num_shown = stop

    def end(self) -> None:
        """Print the rest and a line end; the next text starts anew."""
        self.on_finalized_text(self._decode()[self._num_shown :], stream_end=True)
        self._ids, self._num_shown, self._is_prompt = [], 0, True

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Print a part of the text; subclasses may do something else with it."""
        print(text, end="\n" if stream_end else "", flush=True)

    def _decode(self) -> str:
        return self._tokenizer.decode(self._ids, skip_special_tokens=self._skip_special_tokens)


class TextIteratorStreamer(TextStreamer):
    """An iterator over the parts of the text, for a thread other than the one that generates."""

    def __init__(self, tokenizer: LlamaTokenizer, skip_prompt: bool = False, skip_special_tokens: bool = True) -> None:
        super().__init__(tokenizer, skip_prompt, skip_special_tokens)
        self._parts: SimpleQueue[str | None] = SimpleQueue()

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Hand a part of the text to the iterator."""
        self._parts.put(text)
        if stream_end:
            self._parts.put(None)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        part = self._parts.get()
        if part is None:
            raise StopIteration
        return part
