"""The request queue of a server: bounded, fair among clients, with deadlines and cancellation. Must be used on one event loop.

The ranks receive only as many sequences as they run concurrently; all others wait here at no cost.
"""

import asyncio
import math
import time
from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from launcher.server.errors import (
    ServiceError,
    draining,
    ended,
    no_token_allowed,
    non_finite,
    queue_full,
    ranks_failed,
    timed_out,
    too_many,
)
from launcher.server.inflight_requests import InflightRequests, NewToken, PromptToken
from launcher.server.metrics import ServeMetrics
from model.engine.events import SequenceFailure
from model.engine.request import Request
from model.engine.sampling_params import SamplingParams

_USUAL_SECONDS = 5.0
"""Assumed duration of an answer before any has been measured."""


@dataclass(slots=True, eq=False)
class Ticket:
    """The sequences of one request and their events."""

    caller: str
    num_open: int
    """Unfinished sequences."""
    asked_at: float
    """Submission time, from time.monotonic()."""
    priority: int = 0
    events: "asyncio.Queue[tuple[int, NewToken] | ServiceError]" = field(default_factory=asyncio.Queue)
    """(sequence index in the request, its next token, preceded by any PromptTokens); an error ends the request."""
    deadline: asyncio.TimerHandle | None = None
    told_first: bool = False
    last_token_at: float = 0.0


@dataclass(frozen=True, slots=True, eq=False)
class _Sequence:
    ticket: Ticket
    number: int
    request: Request


class Dispatcher:
    """The queue of one server."""

    def __init__(self, journal: InflightRequests, metrics: ServeMetrics, *, max_running: int, max_waiting: int) -> None:
        self._inflight, self._metrics = journal, metrics
        self.max_running, self.max_waiting = max_running, max_waiting
        self._next_index = 0
        self._waiting: OrderedDict[str, deque[_Sequence]] = OrderedDict()
        """Waiting sequences by client; the client whose turn is next comes first."""
        self._running: dict[int, _Sequence] = {}
        self._drained: asyncio.Event | None = None
        self._answer_seconds = _USUAL_SECONDS

    @property
    def num_waiting(self) -> int:
        """Number of waiting sequences."""
        return sum(map(len, self._waiting.values()))

    @property
    def num_running(self) -> int:
        """Number of sequences that the ranks run."""
        return len(self._running)

    @property
    def is_draining(self) -> bool:
        """Whether new requests are rejected."""
        return self._drained is not None

    def submit(
        self,
        caller: str,
        wanted: Sequence[tuple[tuple[int, ...], SamplingParams]],
        deadline_seconds: float,
        priority: int = 0,
        adapter: str | None = None,
    ) -> Ticket:
        """Queue the sequences of a request; among those of one client, lower priorities go first. `adapter`: see Request.

        Raises ServiceError if the server is draining or too many sequences are waiting."""
        if self.is_draining:
            raise draining()
        self.check_count(len(wanted))
        free = self.max_running - len(self._running)
        if self.num_waiting + len(wanted) > self.max_waiting + free:
            raise queue_full(self.num_waiting, len(wanted), self.max_waiting, self._estimate_wait_seconds())
        ticket = Ticket(caller, len(wanted), time.monotonic(), priority)
        ticket.deadline = asyncio.get_running_loop().call_later(deadline_seconds, self._fail, ticket, timed_out(deadline_seconds))
        mine = self._waiting.setdefault(caller, deque())
        place = next((place for place, sequence in enumerate(mine) if sequence.ticket.priority > priority), len(mine))
        for number, (prompt_ids, params) in enumerate(wanted):
            mine.insert(place + number, _Sequence(ticket, number, Request(self._next_index, prompt_ids, params, adapter=adapter)))
            self._next_index += 1
        self._fill()
        return ticket

    def check_count(self, sequences: int) -> None:
        """Raise ServiceError for a request that could never be queued."""
        if sequences > self.max_running + self.max_waiting:
            raise too_many(sequences, self.max_running + self.max_waiting)

    def close(self, ticket: Ticket) -> None:
        """Cancel the remaining sequences of a request."""
        if ticket.deadline is not None:
            ticket.deadline.cancel()
            ticket.deadline = None
        if not ticket.num_open:
            return
        ticket.num_open = 0
        for index in [index for index, sequence in self._running.items() if sequence.ticket is ticket]:
            del self._running[index]
            self._metrics.note_end("abort", time.monotonic() - ticket.asked_at)
            self._inflight.cancel(index)
        mine = self._waiting.get(ticket.caller)
        if mine is not None:
            left = deque(sequence for sequence in mine if sequence.ticket is not ticket)
            if left:
                self._waiting[ticket.caller] = left
            else:
                del self._waiting[ticket.caller]
        self._fill()

    def end_choice(self, ticket: Ticket, number: int) -> None:
        """Cancel one sequence of a request because its text has reached a stop string."""
        found = [index for index, one in self._running.items() if one.ticket is ticket and one.number == number]
        for index in found:
            del self._running[index]
            ticket.num_open -= 1
            self._metrics.note_end("stop", time.monotonic() - ticket.asked_at)
            self._inflight.cancel(index)
        self._fill()

    def deliver(self, tokens: Iterable[tuple[int, NewToken]]) -> None:
        """Deliver tokens to their requests."""
        now, has_ended = time.monotonic(), False
        for index, token in tokens:
            sequence = self._running.get(index)
            if sequence is None:
                continue
            ticket = sequence.ticket
            ticket.events.put_nowait((sequence.number, token))
            self._metrics.count_token(now - ticket.last_token_at if ticket.told_first else None)
            if not ticket.told_first:
                ticket.told_first = True
                self._metrics.note_first_token(now - ticket.asked_at)
            ticket.last_token_at = now
            if token.finish_reason:
                has_ended = True
                del self._running[index]
                self._metrics.note_end("length" if token.finish_reason == "length" else "stop", now - ticket.asked_at)
                ticket.num_open -= 1
                if not ticket.num_open:
                    self._answer_seconds += 0.1 * (now - ticket.asked_at - self._answer_seconds)
        if has_ended:
            self._fill()

    def deliver_scores(self, tokens: Iterable[tuple[int, PromptToken]]) -> None:
        """Deliver prompt log-probabilities to their requests."""
        for index, token in tokens:
            sequence = self._running.get(index)
            if sequence is not None:
                sequence.ticket.events.put_nowait((sequence.number, token))

    def give_up(self, indices: Sequence[int], failures: int) -> None:
        """Abandon sequences that the ranks failed on repeatedly."""
        for index in indices:
            sequence = self._running.pop(index, None)
            if sequence is not None:
                self._fail(sequence.ticket, ranks_failed(failures))

    def fail_sequences(self, failures: Iterable[SequenceFailure]) -> None:
        """Fail the requests of sequences that have no next token."""
        for failure in failures:
            sequence = self._running.pop(failure.index, None)
            if sequence is not None:
                self._fail(sequence.ticket, (no_token_allowed if failure.by_request else non_finite)(failure.message))

    def refuse(self, index: int, error: ServiceError) -> None:
        """Fail the request of a sequence that the ranks cannot run."""
        sequence = self._running.pop(index, None)
        if sequence is not None:
            self._inflight.cancel(index)
            self._fail(sequence.ticket, error)

    async def drain(self, seconds: float) -> None:
        """Reject new requests and wait until all others are answered, or for `seconds`; the rest then fail."""
        self._drained = asyncio.Event()
        self._fill()
        try:
            await asyncio.wait_for(self._drained.wait(), seconds)
        except asyncio.TimeoutError:
            self.fail_all()

    def fail_all(self) -> None:
        """Fail all requests and reject new ones."""
        self._drained = self._drained or asyncio.Event()
        tickets = {sequence.ticket for some in (*self._waiting.values(), self._running.values()) for sequence in some}
        for ticket in tickets:
            self._fail(ticket, ended())

    def _fail(self, ticket: Ticket, error: ServiceError) -> None:
        ticket.events.put_nowait(error)
        self.close(ticket)

    def _fill(self) -> None:
        """Send the ranks as many sequences as they have room for, round-robin over clients."""
        while self._waiting and len(self._running) < self.max_running:
            caller, mine = next(iter(self._waiting.items()))
            sequence = mine.popleft()
            if mine:
                self._waiting.move_to_end(caller)
            else:
                del self._waiting[caller]
            self._running[sequence.request.index] = sequence
            self._metrics.note_queue_time(time.monotonic() - sequence.ticket.asked_at)
            self._inflight.add(sequence.request)
        if self._drained is not None and not self._running and not self._waiting:
            self._drained.set()

    def _estimate_wait_seconds(self) -> int:
        """Estimate the time until the queue has room, from the durations of past answers."""
        return max(1, min(60, math.ceil(self._answer_seconds / max(1, self.max_running))))
