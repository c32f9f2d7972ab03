"""What the ranks of a server are at work on: every request with the tokens that it has, so that ranks that start again go on with it.

Requests come from one thread, tokens from another, and the question what is left from a third. Knows ids; no text, no HTTP.
"""

import threading
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from launcher.job.messages import Add, Cancel, End
from launcher.job.observer import Send
from model.engine.events import PromptScore, TokenEvent
from model.engine.request import Request

MAX_FAILURES = 3
"""A request that has seen so many failures of ranks since its last token is taken for their cause, and given up."""


class NewToken(NamedTuple):
    """One token of an answer."""

    token_id: int
    finish_reason: str | None
    """eos or length with the last one."""
    logprob: float | None
    top_logprobs: tuple[tuple[int, float], ...]


class PromptToken(NewToken):
    """One token of a prompt, with the log-probability that was asked for."""

    __slots__ = ()


@dataclass(slots=True)
class _Entry:
    request: Request
    token_ids: list[int] = field(default_factory=list)
    num_scored: int = 1
    """Tokens of the prompt whose log-probabilities are known, as that of the first, which has none."""
    failures: int = 0
    """Of ranks that ran it, since the last token."""

    @property
    def remainder(self) -> Request:
        """What is left to do."""
        return replace(self.request, known_ids=tuple(self.token_ids))


class Journal:
    """The requests that the ranks have, or will have as soon as they are there again."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._entries: dict[int, _Entry] = {}
        self._send: Send | None = None
        self._given: set[int] = set()
        """What an attempt that is about to start has been given."""
        self._suspect: int | None = None
        self._held: list[int] = []
        """Further requests that one more failure would end. They wait until the suspect has a token, so that it is known who fails."""

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, request: Request) -> None:
        """Have the ranks go on with it."""
        with self._lock:
            entry = self._entries[request.index] = _Entry(request)
            self._tell_add(entry)

    def cancel(self, index: int) -> None:
        """Nobody wants it any longer; nothing happens where it has ended."""
        with self._lock:
            if self._entries.pop(index, None) is None:
                return
            if index in self._held:
                self._held.remove(index)
            elif self._send is not None:
                self._send(Cancel(index))
            if index == self._suspect:
                self._clear_suspect()

    def drop(self, index: int) -> bool:
        """The ranks have ended it without its last token; whether it was still wanted."""
        with self._lock:
            found = self._entries.pop(index, None) is not None
            if index == self._suspect:
                self._clear_suspect()
            return found

    def end(self) -> None:
        """Have the ranks end when they have nothing left to do."""
        with self._lock:
            if self._send is not None:
                self._send(End())

    def take(self, tokens: Iterable[TokenEvent]) -> list[tuple[int, NewToken]]:
        """Note tokens of rank 0; give what is new."""
        new = []
        with self._lock:
            for token in tokens:
                index, position = token.index, token.position
                entry = self._entries.get(index)
                if entry is None or position < len(entry.token_ids):
                    continue  # cancelled; or the last words of an attempt that failed, said again by the next
                assert position == len(entry.token_ids), f"token {position} of request {index} came before {len(entry.token_ids)}"
                entry.token_ids.append(token.token_id)
                entry.failures = 0
                new.append((index, NewToken(token.token_id, token.finish_reason, token.logprob, token.top_logprobs)))
                if token.finish_reason:
                    del self._entries[index]
                if index == self._suspect:
                    self._clear_suspect()
        return new

    def take_scores(self, scores: Iterable[PromptScore]) -> list[tuple[int, PromptToken]]:
        """Note prompt tokens of rank 0; give what is new."""
        new = []
        with self._lock:
            for score in scores:
                index, position = score.index, score.position
                entry = self._entries.get(index)
                if entry is None or position < entry.num_scored:
                    continue  # cancelled; or said by an attempt that failed
                assert position == entry.num_scored, f"prompt token {position} of request {index} came before {entry.num_scored}"
                entry.num_scored += 1
                token_id, logprob, top = score.choice
                new.append((index, PromptToken(token_id, None, logprob, top)))
        return new

    def note_failure(self, *, served: bool = True) -> list[int]:
        """The ranks have failed, after they had `served` or before: which requests are given up. Ranks that did not come to serve have
        not failed because of any."""
        with self._lock:
            self._send = None
            if not served:
                return []
            for index, entry in self._entries.items():
                entry.failures += index not in self._held
            hopeless = [index for index, entry in self._entries.items() if entry.failures >= MAX_FAILURES]
            for index in hopeless:
                del self._entries[index]
        return hopeless

    def list_unfinished(self) -> tuple[Request, ...]:
        """What an attempt that is about to start has to go on with."""
        with self._lock:
            suspects = [index for index, entry in self._entries.items() if entry.failures == MAX_FAILURES - 1]
            self._suspect, self._held = (suspects[0], suspects[1:]) if suspects else (None, [])
            self._send, self._given = None, set(self._entries).difference(self._held)
            return tuple(entry.remainder for index, entry in self._entries.items() if index in self._given)

    def connect(self, send: Send) -> None:
        """Rank 0 of that attempt listens: tell what has come and gone since."""
        with self._lock:
            self._send = send
            for index, entry in self._entries.items():
                if index not in self._given and index not in self._held:
                    self._tell_add(entry)
            for index in self._given - set(self._entries):
                send(Cancel(index))
            self._given = set()

    def _tell_add(self, entry: _Entry) -> None:
        if self._send is not None:
            self._send(Add(entry.remainder))

    def _clear_suspect(self) -> None:
        self._suspect = self._held.pop(0) if self._held else None
        if self._suspect is not None:
            self._tell_add(self._entries[self._suspect])
