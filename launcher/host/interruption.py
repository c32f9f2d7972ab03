"""SIGINT and SIGTERM in commands without ranks: unwind, so that temporary files are removed, then exit with one sentence.

Imported before any heavy module. While ranks run, `launcher/supervision/signals.py` handles the signals.
"""

import os
import signal
import sys
import time
from contextlib import suppress
from types import FrameType
from typing import NoReturn

_REPEAT_SECONDS = 1.0
"""A terminal and a wrapper script may both deliver one Ctrl-C; only a later signal counts as a second."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption:
    """State of the two signals in this process."""

    def __init__(self) -> None:
        self.number: int | None = None
        """The first signal received, or None."""
        self._at = 0.0

    def catch(self) -> None:
        """Handle both signals, SIGINT even where the shell's `&` has it ignored, as uvicorn and torchrun do."""
        for number in _SIGNALS:
            signal.signal(number, self._handle)

    def exit(self) -> NoReturn:
        """Exit with 128 + signal number, without waiting for threads: their work is no longer needed."""
        assert self.number is not None, "no signal has come"
        with suppress(OSError, ValueError):
            print(f"tandem: stopped by {signal.Signals(self.number).name}", file=sys.stderr, flush=True)
        with suppress(OSError, ValueError):
            sys.stdout.flush()
        os._exit(128 + self.number)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.number is None:
            self.number, self._at = number, now
            raise KeyboardInterrupt
        if now - self._at > _REPEAT_SECONDS:
            self.exit()


interruption = Interruption()
"""The instance of this process."""
