"""Handling of SIGTERM, SIGINT and SIGHUP: the first signal requests a graceful shutdown, the second exits at once.

SIGHUP stays ignored if it was ignored at startup, as under nohup. SIGINT is handled regardless: shells ignore it in background jobs, and
`kill -INT` must stop a server there, as it does with uvicorn and torchrun.
"""

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

from torch.distributed.elastic.multiprocessing import SignalException

from launcher.environment.detection import keep_signals_from_agent
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
    """Context in which signals first request a graceful shutdown. Exits with the elastic agent's SignalException, which the agent
    handles."""

    def __init__(self, ask: Callable[[int], float], takes: Callable[[int], bool] = lambda number: False) -> None:
        """`ask` receives the signal and returns the seconds the shutdown may take. `takes` sees it first and returns True to consume it."""
        self._ask, self._takes = ask, takes
        self._answered = threading.Event()
        self._over = False
        self._lock = threading.Lock()
        self.number: int | None = None
        """The first signal received, or None."""
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "GracefulStop":
        keep_signals_from_agent()
        for number in _SIGNALS:
            self._before[number] = signal.getsignal(number)
            if number != signal.SIGHUP or self._before[number] != signal.SIG_IGN:
                signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self._lock:
            self._over = True
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def answer(self) -> None:
        """Exit now: the requested shutdown is complete."""
        self._answered.set()

    def end_now(self) -> None:
        """Exit the block from another thread."""
        with self._lock:  # no signal may arrive after the block has exited
            if not self._over:
                self.number = self.number or signal.SIGTERM
                os.kill(os.getpid(), self.number)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._over:
            return  # the exit has begun and must not be interrupted
        if self.number is not None:
            self._over = True
            raise SignalException(f"signal {number}", signal.Signals(self.number))
        if self._takes(number):
            return
        self.number = number
        seconds = self._ask(number)
        threading.Thread(target=self._wait, args=(seconds,), daemon=True, name="grace").start()

    def _wait(self, seconds: float) -> None:
        self._answered.wait(seconds)
        self.end_now()
