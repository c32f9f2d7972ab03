"""A clock for timeouts that stops while the process reading it is stopped.

A whole run can be frozen by the cgroup freezer, `docker pause`, Slurm's suspend or SIGSTOP. After it resumes, no rank should count as
late although much wall time has passed.
"""

import threading
import time

_LONGEST_GAP_SECONDS = 1.0
"""Several times the interval between two readings of a waiting loop on a busy machine."""


class ObservedTime:
    """Seconds during which the polling loop was actually running. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last = time.monotonic()
        self._seconds = 0.0

    def read(self) -> float:
        """Return the seconds since the start, counting at most one second between consecutive readings."""
        with self._lock:
            now = time.monotonic()
            self._seconds += min(now - self._last, _LONGEST_GAP_SECONDS)
            self._last = now
            return self._seconds
