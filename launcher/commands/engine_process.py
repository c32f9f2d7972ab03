"""The program's side of the engine process of an `LLM`: starts it, sends requests, and delivers tokens to the threads that wait for them.

Does not depend on PyTorch. Safe to use from several threads, and to interrupt with Ctrl-C at any point.
"""

import os
import signal
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from launcher.server.engine_messages import (
    CancelSequences,
    Ended,
    Instruction,
    Opened,
    Ready,
    Rejected,
    Sequence,
    SequenceFailed,
    Start,
    Submit,
    Token,
    Tokens,
    decode_notice,
    encode,
)
from launcher.supervision.verdict import RanksFailedError, Verdict
from parallel.errors import InputError, RequestError, RunError

_HOME = str(Path(__file__).resolve().parents[2])
_START = (
    f"import sys; sys.path = [{_HOME!r}] * ({_HOME!r} not in sys.path) + [one for one in sys.path if one]; "
    "from launcher.commands.engine_start import main; main()"
)
"""Starts a new interpreter that never imports the program's main module. Unlike `-m`, does not search the current directory first."""
_END_SECONDS = 10.0
_live: "weakref.WeakSet[EngineProcess]" = weakref.WeakSet()

Delivery = list[Token] | Exception
"""New tokens of one call, or the error that ends it."""


class EngineProcess:
    """One engine process and its ranks."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        """Start it and wait until the ranks are ready. `options` are fields of EngineOptions with plain values.

        Raises InputError, RanksFailedError, RunError.
        """
        self._lock = threading.Lock()
        self._next_index = 0
        self._calls: dict[int, SimpleQueue[Delivery]] = {}
        """The queue of each unfinished sequence."""
        self._ended: Exception | None = None
        self._opened: Opened | None = None
        self._ready, self._outbox = SimpleQueue[bool](), SimpleQueue[bytes | None]()
        self.pids: list[int] = []
        """Process ids of the ranks."""
        self._owner = os.getpid()
        self._is_closed = False
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                self._process = subprocess.Popen(
                    [
                        *(sys.executable, "-c", _START, str(theirs.fileno()), str(self._owner)),
                        "preload" if options.get("preload", True) else "fresh",
                    ],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    start_new_session=True,  # Ctrl-C in a terminal belongs to the program
                )
            except OSError as error:
                ours.close()
                raise RunError(f"the engine process cannot be started: {error.strerror}") from None
        self._connection = Connection(ours.detach())
        _live.add(self)
        self._threads = [
            threading.Thread(target=work, daemon=True, name=f"tandem {name}")
            for name, work in (("in", self._hear), ("out", self._send_all))
        ]
        try:
            for thread in self._threads:
                thread.start()
            self._send(Start(dict(options)))
            self._ready.get()
            if self._ended is not None:
                raise self._ended.with_traceback(None)
        except BaseException:
            self.close()
            raise

    @property
    def opened(self) -> Opened:
        """Facts about the model."""
        assert self._opened is not None, "the ranks are ready"
        return self._opened

    @contextmanager
    def submit(self, sequences: list[Sequence]) -> Iterator["Call"]:
        """Run sequences in the block; those unfinished at its end are cancelled. Raises the error that ended the engine."""
        self.require_alive()
        queue: SimpleQueue[Delivery] = SimpleQueue()
        with self._lock:
            first = self._next_index
            self._next_index += len(sequences)
        call = Call(self, first, len(sequences), queue)
        try:
            with self._lock:
                if self._ended is not None:
                    raise self._ended.with_traceback(None)
                self._calls |= dict.fromkeys(range(first, first + len(sequences)), queue)
            self._send(Submit(first, sequences))
            yield call
        finally:
            self._cancel(range(first, first + len(sequences)))

    def cancel(self, index: int) -> None:
        """Cancel one sequence."""
        self._cancel([index])

    def close(self) -> None:
        """Stop the ranks and wait until they have exited; pending calls fail. Not for a fork of the program, which owns no ranks."""
        if self._is_closed or os.getpid() != self._owner:
            return
        self._is_closed = True
        self._end(RunError("this LLM is closed: create another one"))
        self._outbox.put(None)
        with suppress(OSError):
            self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()  # the kernel then kills the ranks
            self._process.wait()
        for thread in self._threads:
            if thread.is_alive() and thread is not threading.current_thread():
                thread.join(_END_SECONDS)
        self._connection.close()

    def forget(self) -> None:
        """Give up the ranks in a fork of the program."""
        with suppress(OSError):
            self._connection.close()

    def require_alive(self) -> None:
        """Raise the error that ended the engine, if it has ended."""
        if os.getpid() != self._owner:
            raise RunError(f"this LLM belongs to process {self._owner}, of which this one is a fork: create an LLM here")
        if self._ended is not None:
            raise self._ended.with_traceback(None)

    def _cancel(self, indices: Any) -> None:
        with self._lock:
            left = [index for index in indices if self._calls.pop(index, None) is not None]
            if left and self._ended is None:
                self._send(CancelSequences(left))

    def _send(self, instruction: Instruction) -> None:
        # Another thread writes: an exception in the middle of a write, such as KeyboardInterrupt, would break the connection.
        self._outbox.put(encode(instruction))

    def _send_all(self) -> None:
        with suppress(OSError, ValueError):
            while (instruction := self._outbox.get()) is not None:
                self._connection.send_bytes(instruction)

    def _hear(self) -> None:
        with suppress(EOFError, OSError):
            while True:
                self._take(self._connection.recv_bytes())
        self._end(RunError(f"the engine process has exited unexpectedly{self._describe_exit()}: create another LLM"))

    def _take(self, raw: bytes) -> None:
        match decode_notice(raw):
            case Tokens() as some:
                self._deliver(some.tokens)
            case Rejected() as rejected:
                self._fail(rejected.first, RequestError(rejected.message))
            case SequenceFailed() as failed:
                self._fail(failed.index, RunError(failed.message))
            case Opened() as opened:
                self._opened = opened
            case Ready() as ready:
                self.pids = ready.pids
                self._ready.put(True)
            case Ended() as ended:
                self._end(_build_error(ended))

    def _deliver(self, tokens: list[Token]) -> None:
        batches: dict[int, tuple[SimpleQueue[Delivery], list[Token]]] = {}
        with self._lock:
            for token in tokens:
                queue = self._calls.get(token.sequence)
                if queue is not None:
                    batches.setdefault(id(queue), (queue, []))[1].append(token)
                    if token.finish_reason:
                        del self._calls[token.sequence]
        for queue, batch in batches.values():
            queue.put(batch)

    def _fail(self, index: int, error: Exception) -> None:
        with self._lock:
            queue = self._calls.get(index)
        if queue is not None:
            queue.put(error)

    def _end(self, error: Exception) -> None:
        """Fail all calls, now and later; the first error counts."""
        with self._lock:
            if self._ended is None:
                self._ended = error
            queues = {id(queue): queue for queue in self._calls.values()}
            self._calls.clear()
        for queue in queues.values():
            queue.put(self._ended)
        self._ready.put(False)

    def _describe_exit(self) -> str:
        with suppress(subprocess.TimeoutExpired):
            code = self._process.wait(1)
            return f" (ended by {signal.Signals(-code).name})" if code < 0 else f" (exit code {code})"
        return ""


class Call:
    """The running sequences of one call."""

    def __init__(self, engine: EngineProcess, first: int, count: int, queue: "SimpleQueue[Delivery]") -> None:
        self._engine, self._first, self._queue = engine, first, queue
        self._open = set(range(count))

    def __iter__(self) -> Iterator[tuple[int, Token]]:
        """Yield (number of the sequence in the call, its next token) until all have finished. Raises the error that ends the call."""
        while self._open:
            delivery = self._queue.get()
            if isinstance(delivery, Exception):
                raise delivery.with_traceback(None)
            for token in delivery:
                number = token.sequence - self._first
                if number in self._open:  # tokens in flight when a sequence was stopped are dropped
                    if token.finish_reason:
                        self._open.discard(number)
                    yield number, token

    def stop(self, number: int) -> None:
        """End one sequence early: its text has reached a stop string."""
        if number in self._open:
            self._open.discard(number)
            self._engine.cancel(self._first + number)


def _build_error(ended: Ended) -> Exception:
    if ended.verdict is not None:
        return RanksFailedError(Verdict.from_json(ended.verdict), is_input=ended.is_input)
    return InputError(ended.message) if ended.kind == "input" else RunError(ended.message)


def _forget_all() -> None:
    for engine in list(_live):
        engine.forget()


os.register_at_fork(after_in_child=_forget_all)
