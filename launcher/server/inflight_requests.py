"""In-flight requests with the tokens generated so far, so that restarted ranks can resume them.

Thread-safe: requests are added by one thread, tokens by another, and a third asks for the remaining work.
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
"""A request with this many rank failures since its last token is considered their cause and abandoned."""


class NewToken(NamedTuple):
    """One generated token."""

    token_id: int
    finish_reason: str | None
    """"eos" or "length" on the last token, otherwise None."""
    logprob: float | None
    top_logprobs: tuple[tuple[int, float], ...]
    rank: int = 0
    """Number of tokens at least as likely, for a prompt token with its log-probability."""


class PromptToken(NewToken):
    """One prompt token with its requested log-probability."""

    __slots__ = ()


@dataclass(slots=True)
class _Entry:
    request: Request
    token_ids: list[int] = field(default_factory=list)
    num_scored: int = 1
    """Prompt tokens with known log-probabilities; the first token counts although it has none."""
    failures: int = 0
    """Rank failures since the last token."""

    @property
    def remainder(self) -> Request:
        """Return the request with its tokens so far, for resumption."""
        return replace(self.request, resumed_ids=tuple(self.token_ids))


class InflightRequests:
    """The requests that the ranks run, or will run once they have restarted."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._entries: dict[int, _Entry] = {}
        self._send: Send | None = None
        self._given: set[int] = set()
        """Requests passed to an attempt that is about to start."""
        self._suspect: int | None = None
        self._held: list[int] = []
        """Further requests that one more failure would abandon. They wait until the suspect yields a token, which isolates the cause."""

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, request: Request) -> None:
        """Add a request for the ranks to run."""
        with self._lock:
            entry = self._entries[request.index] = _Entry(request)
            self._tell_add(entry)

    def cancel(self, index: int) -> None:
        """Cancel a request; no effect if it has finished."""
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
        """Remove a request that the ranks ended without a last token; returns whether it was still in flight."""
        with self._lock:
            found = self._entries.pop(index, None) is not None
            if index == self._suspect:
                self._clear_suspect()
            return found

    def end(self) -> None:
        """Tell the ranks to exit when they have no work left."""
        with self._lock:
            if self._send is not None:
                self._send(End())

    def take(self, tokens: Iterable[TokenEvent]) -> list[tuple[int, NewToken]]:
        """Record tokens from rank 0; return the new ones."""
        new = []
        with self._lock:
            for token in tokens:
                index, position = token.index, token.position
                entry = self._entries.get(index)
                if entry is None or position < len(entry.token_ids):
                    continue  # cancelled, or a duplicate: the last tokens of a failed attempt, repeated by the next
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
        """Record scored prompt tokens from rank 0; return the new ones."""
        new = []
        with self._lock:
            for score in scores:
                index, position = score.index, score.position
                entry = self._entries.get(index)
                if entry is None or position < entry.num_scored:
                    continue  # cancelled, or recorded in a failed attempt
                assert position == entry.num_scored, f"prompt token {position} of request {index} came before {entry.num_scored}"
                entry.num_scored += 1
                choice = score.choice
                new.append((index, PromptToken(choice.token_id, None, choice.logprob, choice.top_logprobs, choice.rank)))
        return new

    def note_failure(self, *, served: bool = True) -> list[int]:
        """Record a rank failure and return the abandoned requests. Failures before the ranks were ready (`served` False) blame no
        request."""
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
        """Return the requests that an attempt about to start must resume."""
        with self._lock:
            suspects = [index for index, entry in self._entries.items() if entry.failures == MAX_FAILURES - 1]
            self._suspect, self._held = (suspects[0], suspects[1:]) if suspects else (None, [])
            self._send, self._given = None, set(self._entries).difference(self._held)
            return tuple(entry.remainder for index, entry in self._entries.items() if index in self._given)

    def connect(self, send: Send) -> None:
        """Attach to rank 0 of that attempt and send it the requests added and cancelled since."""
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
