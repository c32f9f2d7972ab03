"""Trace of one rank: named time spans, and collectives that record theirs.

All processes of a host share the clock, so spans of several ranks can be shown on one timeline.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from parallel.collectives import Collectives
from parallel.shared_memory import SharedSlots, SharesSlots

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


class RecordedCollectives:
    """Wraps any collectives and records each call while `recorder` is set."""

    def __init__(self, inner: Collectives) -> None:
        self._inner = inner
        self.recorder: Recorder | None = None
        self.name, self.rank, self.world_size = inner.name, inner.rank, inner.world_size

    def gather_columns(self, local: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        """Join [rows, sizes[rank]] of every rank into [rows, sum(sizes)]."""
        if self.recorder is None:
            return self._inner.gather_columns(local, sizes)
        started = time.monotonic_ns()
        whole = self._inner.gather_columns(local, sizes)
        self.recorder.add(0, started)
        return whole

    def share_slots(self) -> SharedSlots | None:
        """Return None while recording, so that each gather goes through `gather_columns`."""
        return self._inner.share_slots() if self.recorder is None and isinstance(self._inner, SharesSlots) else None

    def barrier(self) -> None:
        """Block until every rank has reached the barrier."""
        if self.recorder is None:
            return self._inner.barrier()
        started = time.monotonic_ns()
        self._inner.barrier()
        self.recorder.add(1, started)

    def beat(self) -> None:
        """Signal the peers that this rank is alive."""
        self._inner.beat()

    def close(self) -> None:
        """Release the resources of the wrapped collectives."""
        self._inner.close()
