"""Parent side of the ranks of an `LLM`: runs the sequences of its program in order, and resumes them after a restart."""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence

from msgspec import structs

from launcher.job.messages import Event, Failures, Loading, RankWarning, Refused, Serving, Tokens
from launcher.job.observer import RunObserver, Send
from launcher.job.tasks import Serve, Task
from launcher.server import engine_messages
from launcher.server.engine_client import MAX_FAILED_STARTS
from launcher.server.engine_messages import Notice, Ready, SequenceFailed, Token
from launcher.server.inflight_requests import MAX_FAILURES, InflightRequests
from model.engine.request import Request


class LocalEngine(RunObserver):
    """The ranks of one `LLM`."""

    redone = "unfinished requests resume"

    def __init__(self, max_running: int, tell: Callable[[Notice], None], progress: Callable[[int, int], None]) -> None:
        """`tell` sends a notice to the program; `progress` shows (done, total) bytes of loading."""
        self._max_running, self._tell, self._progress = max_running, tell, progress
        self._inflight, self._lock = InflightRequests(), threading.Lock()
        self._waiting: deque[Request] = deque()
        self._running: set[int] = set()
        self._serving, self._failed_starts = False, 0

    def submit(self, requests: Iterable[Request]) -> None:
        """Queue requests; the ranks receive only as many as they run concurrently."""
        with self._lock:
            self._waiting.extend(requests)
            self._fill()

    def cancel(self, indices: Sequence[int]) -> None:
        """Cancel requests; no effect on finished ones."""
        gone = set(indices)
        with self._lock:
            if gone - self._running:
                self._waiting = deque(request for request in self._waiting if request.index not in gone)
            for index in gone & self._running:
                self._running.discard(index)
                self._inflight.cancel(index)
            self._fill()

    def on_event(self, event: Event) -> None:
        """Take one event of rank 0."""
        match event:
            case Tokens():
                tokens = self._inflight.take(event.tokens)
                if tokens:
                    self._tell(
                        engine_messages.Tokens(
                            [
                                Token(index, token.token_id, token.finish_reason, token.logprob, token.top_logprobs)
                                for index, token in tokens
                            ]
                        )
                    )
                    self._end(index for index, token in tokens if token.finish_reason)
            case Failures():
                self._fail((failure.index, failure.message) for failure in event.failures)
            case Refused():
                self._fail([(event.index, event.message)])
            case Loading():
                self._progress(event.done, event.total)
            case Serving():
                self._serving, self._failed_starts = True, 0
                self._tell(Ready(list(event.pids)))
            case RankWarning():
                self.warn(event.message)

    def warn(self, message: str) -> None:
        """Show a warning of the ranks. Replaced by the engine process."""

    def connect(self, send: Send) -> None:
        """Attach to rank 0 of a new attempt."""
        self._inflight.connect(send)

    def continue_task(self, task: Task) -> Task:
        """Return every running request with its tokens so far."""
        assert isinstance(task, Serve)
        return structs.replace(task, requests=self._inflight.list_unfinished())

    def note_failure(self, cause: str, at_seconds: float) -> None:
        """Handle a rank failure; all ranks restart."""
        served, self._serving = self._serving, False
        self._failed_starts = 0 if served else self._failed_starts + 1
        words = f"the ranks failed {MAX_FAILURES} times while this request ran, without a token in between; it was abandoned"
        self._fail((index, words) for index in self._inflight.note_failure(served=served))

    def may_restart(self) -> bool:
        """Return False after too many consecutive failed starts."""
        return self._failed_starts + (not self._serving) < MAX_FAILED_STARTS

    def ask_to_stop(self, number: int) -> float | None:
        """Stop at once: the program has no more use for its ranks."""
        return 0.0

    def _fail(self, failures: Iterable[tuple[int, str]]) -> None:
        for index, message in failures:
            self._inflight.drop(index)
            self._tell(SequenceFailed(index, message))
            self._end([index])

    def _end(self, indices: Iterable[int]) -> None:
        with self._lock:
            self._running.difference_update(indices)
            self._fill()

    def _fill(self) -> None:
        while self._waiting and len(self._running) < self._max_running:
            request = self._waiting.popleft()
            self._running.add(request.index)
            self._inflight.add(request)
