"""Parent side of `tandem chat`: sends one request at a time to the ranks and streams its tokens. A restart resumes the answer."""

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from queue import SimpleQueue

from msgspec import structs

from launcher.job.messages import Event, Failures, Loading, RankWarning, Refused, Serving, Tokens
from launcher.job.observer import RunObserver, Send
from launcher.job.tasks import Serve, Task
from launcher.reporting.console import loading_progress
from launcher.server.inflight_requests import InflightRequests, NewToken
from model.engine.request import Request
from parallel.errors import RunError

_MAX_FAILED_STARTS = 3


class ChatEngineClient(RunObserver):
    """The ranks serving one conversation."""

    redone = "the answer continues"

    def __init__(self, world_size: int, on_idle_interrupt: Callable[[], bool]) -> None:
        """`on_idle_interrupt` is called on SIGINT while no answer is in progress and returns whether the program continues."""
        self._inflight, self._progress = InflightRequests(), loading_progress(world_size)
        self._on_idle_interrupt = on_idle_interrupt
        self._tokens: SimpleQueue[NewToken | None] = SimpleQueue()
        """Tokens of the current answer; None marks one that was stopped or abandoned."""
        self._failure: str | None = None
        """Why the current answer was abandoned."""
        self._current: int | None = None
        self._num_requests = 0
        self._serving, self._failed_starts = False, 0
        self.ready = threading.Event()
        """Set when the ranks are ready for the first time."""

    def answer(self, make_request: Callable[[int], Request]) -> Iterator[NewToken]:
        """Yield the tokens of an answer as they arrive, ending early if it is stopped. Raises RunError if it is abandoned after rank
        failures."""
        index, self._num_requests = self._num_requests, self._num_requests + 1
        self._tokens, self._failure = SimpleQueue(), None
        self._current = index
        self._inflight.add(make_request(index))
        try:
            while (token := self._tokens.get()) is not None:
                yield token
                if token.finish_reason:
                    return
            if self._failure is not None:
                raise RunError(self._failure)
        finally:
            self._current = None
            self._inflight.cancel(index)

    def end(self) -> None:
        """Tell the ranks to exit."""
        self._inflight.end()

    def on_event(self, event: Event) -> None:
        """Take one event of rank 0."""
        match event:
            case Tokens():
                for index, token in self._inflight.take(event.tokens):
                    if index == self._current:
                        self._tokens.put(token)
            case Failures():
                for failure in event.failures:
                    self._give_up(failure.index, failure.message)
            case Refused():
                self._give_up(event.index, event.message)
            case Loading():
                self._progress(event.done, event.total)
            case Serving():
                self._serving, self._failed_starts = True, 0
                self.ready.set()
            case RankWarning():
                print(f"warning: {event.message}", file=sys.stderr)

    def connect(self, send: Send) -> None:
        """Attach to rank 0 of a new attempt."""
        self._inflight.connect(send)

    def continue_task(self, task: Task) -> Task:
        """Return the unfinished answer with its tokens so far."""
        assert isinstance(task, Serve)
        return structs.replace(task, requests=self._inflight.list_unfinished())

    def note_failure(self, cause: str, at_seconds: float) -> None:
        """Handle a rank failure; all ranks restart."""
        served, self._serving = self._serving, False
        self._failed_starts = 0 if served else self._failed_starts + 1
        self._progress.close()
        for index in self._inflight.note_failure(served=served):
            self._give_up(index, "the ranks failed repeatedly on this message; it was abandoned")

    def _give_up(self, index: int, message: str) -> None:
        self._inflight.drop(index)
        if index == self._current:
            self._failure = message
            self._tokens.put(None)

    def may_restart(self) -> bool:
        """Return False after too many consecutive failed starts."""
        return self._failed_starts + (not self._serving) < _MAX_FAILED_STARTS

    def takes_signal(self, number: int) -> bool:
        """Handle SIGINT: stop the current answer, or ask `on_idle_interrupt` if there is none."""
        if number != signal.SIGINT or not self.ready.is_set():
            return False
        if self._current is None:
            return self._on_idle_interrupt()
        self._tokens.put(None)
        return True

    def close(self) -> None:
        """Remove the progress bar."""
        self._progress.close()
