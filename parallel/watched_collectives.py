"""Collectives that record on a rank's line of the progress board what it is doing."""

import time
from collections.abc import Sequence
from dataclasses import replace

import torch

from parallel.collectives import Collectives
from parallel.progress import CODES, Progress
from parallel.shared_memory import SharedSlots, SharesSlots


class WatchedCollectives:
    """Wraps any collectives and updates this rank's line. When a collective fails, the line keeps its name."""

    def __init__(self, inner: Collectives, progress: Progress) -> None:
        self._inner, self._progress = inner, progress
        self.name, self.rank, self.world_size = inner.name, inner.rank, inner.world_size

    def gather_columns(self, local: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        """Join [rows, sizes[rank]] of every rank into [rows, sum(sizes)]."""
        self._progress.enter("gather_columns")
        started = time.monotonic_ns()
        whole = self._inner.gather_columns(local, sizes)
        self._progress.add_gather(time.monotonic_ns() - started)
        self._progress.set_operation("computing")
        return whole

    def share_slots(self) -> SharedSlots | None:
        """Return the slots of the wrapped collectives, with the addresses of this rank's line."""
        slots = self._inner.share_slots() if isinstance(self._inner, SharesSlots) else None
        return (
            None
            if slots is None
            else replace(slots, line=self._progress.addresses, gathering=CODES["gather_columns"], computing=CODES["computing"])
        )

    def barrier(self) -> None:
        """Block until every rank has reached the barrier."""
        self._progress.enter("barrier")
        self._inner.barrier()
        self._progress.set_operation("computing")

    def beat(self) -> None:
        """Record progress and signal the peers."""
        self._progress.beat()
        self._inner.beat()

    def rejoin(self, inner: Collectives) -> None:
        """Close the wrapped collectives, which have lost a peer, and use others of the same rank among as many ranks."""
        assert (inner.rank, inner.world_size) == (self.rank, self.world_size), "the model is split for this rank"
        self._inner.close()
        self._inner, self.name = inner, inner.name

    def close(self) -> None:
        """Release the resources of the wrapped collectives."""
        self._inner.close()
