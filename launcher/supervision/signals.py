"""What SIGTERM, SIGINT and SIGHUP do to a run: the first asks for an end, a second ends it at once.

Knows signals and a question to ask; not what answers it.
"""

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

from torch.distributed.elastic.multiprocessing import SignalException

from parallel.errors import TandemError

GRACE_SECONDS = 3.0
"""How long the current token may take."""
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class StoppedError(TandemError):
    """A signal ended the run."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signal_number).name}")
        self.signal_number = signal_number


class GracefulStop:
    """In its `with` block signals ask first. Ends the block with the elastic agent's SignalException, which its agent understands."""

    def __init__(self, ask: Callable[[int], float]) -> None:
        """`ask` gets the signal, and says how many seconds the end may take."""
        self._ask = ask
        self._answered = threading.Event()
        self._over = False
        self._lock = threading.Lock()
        self.number: int | None = None
        """The signal that came first; None when none did."""
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "GracefulStop":
        self._before = {number: signal.getsignal(number) for number in _SIGNALS}
        self.take_over()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self._lock:
            self._over = True
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def take_over(self) -> None:
        """Handle the signals, again where somebody else has begun to."""
        for number in _SIGNALS:
            signal.signal(number, self._handle)

    def answer(self) -> None:
        """What was asked for is done: end now."""
        self._answered.set()

    def end_now(self) -> None:
        """End the block from another thread."""
        with self._lock:  # the signal must not come when the block has ended
            if not self._over:
                self.number = self.number or signal.SIGTERM
                os.kill(os.getpid(), self.number)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._over:
            return  # the end has begun; it is not to be broken off
        if self.number is not None:
            self._over = True
            raise SignalException(f"signal {number}", signal.Signals(self.number))
        self.number = number
        seconds = self._ask(number)
        threading.Thread(target=self._wait, args=(seconds,), daemon=True, name="grace").start()

    def _wait(self, seconds: float) -> None:
        self._answered.wait(seconds)
        self.end_now()
