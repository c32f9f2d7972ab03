"""What the ranks of a server are at work on: every request with the tokens that it has, so that ranks that start again go on with it.

Requests come from one thread, tokens from another, and the question what is left from a third. Knows ids; no text, no HTTP.
"""

import threading
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

from launcher.job.observer import Send
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


@dataclass(slots=True)
class _Entry:
    request: Request
    token_ids: list[int] = field(default_factory=list)
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
                self._send({"do": "cancel", "index": index})
            if index == self._suspect:
                self._clear_suspect()

    def end(self) -> None:
        """Have the ranks end when they have nothing left to do."""
        with self._lock:
            if self._send is not None:
                self._send({"do": "end"})

    def take(self, tokens: Iterable[Sequence[Any]]) -> list[tuple[int, NewToken]]:
        """Note tokens of rank 0, (index, position, id, finish reason, log-probability, those of the likeliest); give what is new."""
        new = []
        with self._lock:
            for index, position, token_id, reason, logprob, top in tokens:
                entry = self._entries.get(index)
                if entry is None or position < len(entry.token_ids):
                    continue  # cancelled; or the last words of an attempt that failed, said again by the next
                assert position == len(entry.token_ids), f"token {position} of request {index} came before {len(entry.token_ids)}"
                entry.token_ids.append(token_id)
                entry.failures = 0
                new.append((index, NewToken(token_id, reason, logprob, tuple((i, value) for i, value in top))))
                if reason:
                    del self._entries[index]
                if index == self._suspect:
                    self._clear_suspect()
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
                send({"do": "cancel", "index": index})
            self._given = set()

    def _tell_add(self, entry: _Entry) -> None:
        if self._send is not None:
            self._send({"do": "add", "request": asdict(entry.remainder)})

    def _clear_suspect(self) -> None:
        self._suspect = self._held.pop(0) if self._held else None
        if self._suspect is not None:
            self._tell_add(self._entries[self._suspect])
