"""Named time spans of one rank.

All processes of a host share the clock, so spans of several ranks can be shown on one timeline.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

GATHER, BARRIER = "gather_columns", "barrier"


class Recorder:
    """Spans (index of the name, start, duration; nanoseconds of CLOCK_MONOTONIC), in the order in which they end."""

    def __init__(self) -> None:
        self.names: list[str] = [GATHER, BARRIER]
        self.spans: list[tuple[int, int, int]] = []

    def number(self, name: str) -> int:
        """Return the index of a name."""
        if name not in self.names:
            self.names.append(name)
        return self.names.index(name)

    def add(self, number: int, started: int) -> None:
        """Add a span that ends now."""
        self.spans.append((number, started, time.monotonic_ns() - started))

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Record the body of the `with` statement as a span."""
        number, started = self.number(name), time.monotonic_ns()
        yield
        self.add(number, started)
