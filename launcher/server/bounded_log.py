"""Rate-limited logging to standard error, so that clients cannot flood it: one line per second and kind, with a count of those
suppressed."""

import logging
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

INTERVAL_SECONDS = 1.0
_MAX_KINDS = 100
"""Maximum number of distinct kinds; all further kinds share one interval."""


def _print(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@dataclass(slots=True)
class _Kind:
    next_at: float
    suppressed: int = 0


class BoundedLog:
    """Rate-limited reporter of faults."""

    def __init__(self, write: Callable[[str], None] = _print, read_seconds: Callable[[], float] = time.monotonic) -> None:
        self._write, self._read_seconds = write, read_seconds
        self._kinds: dict[str, _Kind] = {}

    def report(self, kind: str, text: str) -> None:
        """Write `text`, or only count it if this kind was reported less than INTERVAL_SECONDS ago."""
        suppressed = self.admit(kind)
        if suppressed is not None:
            self._write(f"{text} ({suppressed} more of this kind since the last report)" if suppressed else text)

    def admit(self, kind: str) -> int | None:
        """Return the number of reports suppressed since the last one, or None if this report must be suppressed too."""
        now = self._read_seconds()
        if kind not in self._kinds and len(self._kinds) >= _MAX_KINDS:
            kind = "other"
        found = self._kinds.setdefault(kind, _Kind(now))
        if now < found.next_at:
            found.suppressed += 1
            return None
        found.next_at, suppressed, found.suppressed = now + INTERVAL_SECONDS, found.suppressed, 0
        return suppressed


class BoundedRecords(logging.Filter):
    """Logging filter that rate-limits the records of a library's logger by their unformatted message."""

    def __init__(self, read_seconds: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._log = BoundedLog(read_seconds=read_seconds)

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether to write the record; a record that follows suppressed ones includes their number."""
        suppressed = self._log.admit(str(record.msg)[:200])
        if suppressed:
            record.msg = f"{record.msg} (%d more of this kind since the last report)"
            record.args = (*(record.args if isinstance(record.args, tuple) else ()), suppressed)
        return suppressed is not None


class OnceLog:
    """Reports each name once, up to a maximum number of names. Thread-safe."""

    def __init__(self, write: Callable[[str], None] = _print) -> None:
        self._write, self._lock = write, threading.Lock()
        self._seen: set[str] = set()

    def report(self, name: str, text: str) -> None:
        """Write `text` if this name has not been reported yet."""
        with self._lock:
            if name in self._seen or len(self._seen) > _MAX_KINDS:
                return
            self._seen.add(name)
            is_last = len(self._seen) > _MAX_KINDS
        self._write("further reports of this kind are suppressed" if is_last else text)
