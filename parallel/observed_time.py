"""A clock for time limits of waits: it stands still while the process that reads it does.

A run can be frozen as a whole, by a control group's freezer, `docker pause`, Slurm's suspend or SIGSTOP. When it goes on nobody has
been late, though much time has passed.
"""

import threading
import time

_LONGEST_GAP_SECONDS = 1.0
"""Several times what lies between two readings of a waiting loop on a busy machine."""


class ObservedTime:
    """Seconds during which the loop that reads it was running. Readings may come from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last = time.monotonic()
        self._seconds = 0.0

    def read(self) -> float:
        """Seconds since the start; of the time since the last reading one second at most counts."""
        with self._lock:
            now = time.monotonic()
            self._seconds += min(now - self._last, _LONGEST_GAP_SECONDS)
            self._last = now
            return self._seconds
