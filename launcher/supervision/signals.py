"""Handling of SIGTERM, SIGINT and SIGHUP: the first signal requests a graceful shutdown, the second exits at once.

A handler only notes the signal; the supervisor's loop looks at it. SIGHUP stays ignored if it was ignored at startup, as under nohup.
SIGINT is handled regardless: shells ignore it in background jobs, and `kill -INT` must stop a server there, as it does with uvicorn and
torchrun.
"""

import signal
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

from parallel.errors import TandemError

GRACE_SECONDS = 3.0
"""How long the current token may take."""
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class StoppedError(TandemError):
    """The run was stopped by a signal."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signal_number).name}")
        self.signal_number = signal_number


class GracefulStop:
    """Context in which signals, or `request`, first ask for a graceful shutdown. Outside the main thread it handles no signals."""

    def __init__(self, ask: Callable[[int], float], takes: Callable[[int], bool] = lambda number: False) -> None:
        """`ask` receives the signal and returns the seconds the shutdown may take. `takes` sees it first and returns True to consume it."""
        self._ask, self._takes = ask, takes
        self._answered = False
        self._deadline: float | None = None
        self.number: int | None = None
        """The first signal received, or None."""
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "GracefulStop":
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                self._before[number] = signal.getsignal(number)
                if number != signal.SIGHUP or self._before[number] != signal.SIG_IGN:
                    signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def answer(self) -> None:
        """Note that the requested shutdown is complete."""
        self._answered = True

    def request(self, number: int) -> None:
        """Ask for the shutdown as this signal would."""
        if self.number is not None:
            self._answered = True
            return
        self.number = number
        self._deadline = time.monotonic() + self._ask(number)

    def raise_if_due(self) -> None:
        """Raise StoppedError if the shutdown is complete, took too long, or was requested twice."""
        if self.number is not None and (self._answered or (self._deadline is not None and time.monotonic() > self._deadline)):
            raise StoppedError(self.number)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.number is None and self._takes(number):
            return
        self.request(number)
