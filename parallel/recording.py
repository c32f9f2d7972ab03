"""Collectives that record their calls as spans of a rank."""

import time
from collections.abc import Sequence

import torch

from parallel.collectives import Collectives
from parallel.recorder import Recorder
from parallel.shared_memory import SharedSlots, SharesSlots


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
