"""Collectives: gather every rank's columns in rank order. Nothing is ever reduced, so results do not depend on the number of ranks.

One interface: identity (one rank), gloo; shared memory (`parallel/shared_memory.py`), both (`parallel/node_collectives.py`), and ranks on
devices (`parallel/device_collectives.py`).
"""

import ctypes
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Protocol

import torch

from parallel.errors import PeerError
from parallel.observed_time import ObservedTime
from parallel.peer_lines import PeerLines
from parallel.store_waiting import StoreBarrier, StoreBeats
from parallel.torch_internals import Store, gather_bytes, open_gloo_group

_LOOK = timedelta(seconds=0.5)


class Collectives(Protocol):
    """Communication between the ranks of a run."""

    name: str
    rank: int
    world_size: int

    def gather_columns(self, local: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        """Join [rows, sizes[rank]] of every rank into [rows, sum(sizes)]. The result is bitwise identical on every rank."""
        ...

    def barrier(self) -> None:
        """Block until every rank has reached the barrier."""
        ...

    def beat(self) -> None:
        """Signal the peers that this rank is alive (loading or computing), so that their timeouts restart."""
        ...

    def close(self) -> None:
        """Release all resources."""
        ...


class IdentityCollectives:
    """Collectives of a single rank: no communication."""

    name = "identity"
    rank = 0
    world_size = 1

    def gather_columns(self, local: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        """Return the tensor unchanged."""
        return local

    def barrier(self) -> None:
        """Return at once."""

    def beat(self) -> None:
        """Do nothing: there are no peers."""

    def close(self) -> None:
        """Do nothing: there are no resources."""


class GlooCollectives:
    """gloo, between the processors of any hosts. Barriers go through the store, whose timeout can be extended.

    `address`: the local address to listen on. `ranks`: rank numbers to use in messages when this group is only part of a run.
    """

    name = "gloo"

    def __init__(
        self,
        store: Store,
        rank: int,
        world_size: int,
        timeout_seconds: float,
        address: str = "127.0.0.1",
        *,
        ranks: Sequence[int] | None = None,
    ) -> None:
        self.rank, self.world_size = rank, world_size
        self._ranks = list(range(world_size)) if ranks is None else list(ranks)
        me = self._ranks[rank]
        self._beats = StoreBeats(store, me)
        timeout, self._timeout_seconds = timedelta(seconds=timeout_seconds), timeout_seconds
        self._group: Any = None
        # Wait until all ranks are present before connecting: only the store's wait can name a late rank.
        self._lines = PeerLines(store, me, self._ranks, address, timeout_seconds)
        self._barrier = StoreBarrier(store, me, self._ranks, timeout_seconds, self._lines.find_gone)
        try:
            self._group = open_gloo_group(store, rank, world_size, timeout, address)
        except RuntimeError as error:
            raise self._fail("connect", error) from error

    def gather_columns(self, local: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        """Join [rows, sizes[rank]] of every rank into [rows, sum(sizes)].

        Parts are sent as bytes, padded to the widest part: gloo lacks some dtypes, and uneven sizes.
        """
        rows, widest = local.shape[0], max(sizes)
        mine = local.new_zeros((rows, widest))
        mine[:, : local.shape[1]] = local
        parts = [torch.empty_like(mine) for _ in sizes]
        sent, received = mine.view(torch.uint8), [part.view(torch.uint8) for part in parts]
        try:
            self._wait(gather_bytes(self._group, received, sent))
        except RuntimeError as error:
            raise self._fail("gather_columns", error) from error
        return torch.cat([part[:, :size] for part, size in zip(parts, sizes, strict=True)], dim=1)

    def barrier(self) -> None:
        """Block until every rank has reached the barrier."""
        self._barrier.wait()

    def beat(self) -> None:
        """Signal the peers that this rank is alive."""
        self._beats.beat()

    def close(self) -> None:
        """Leave the process group."""
        self._lines.close()
        self._group = None

    def _wait(self, work: Any) -> None:
        """Wait for `work`. Raises RuntimeError when it fails or exceeds the timeout, not counting time in which this process was frozen."""
        clock = ObservedTime()
        while True:
            try:
                work.wait(_LOOK)
                return
            except RuntimeError as error:
                if work.is_completed():  # perhaps only just: then this returns, or raises what really happened
                    work.wait(_LOOK)
                    return
                if clock.read() > self._timeout_seconds:
                    # Destroying a gloo group waits for its pending work, which may never finish here: leak a reference so that it is never
                    # destroyed.
                    ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._group))
                    raise RuntimeError(f"no answer within {self._timeout_seconds:g} s") from error

    def _fail(self, operation: str, error: RuntimeError) -> PeerError:
        me, gone = self._ranks[self.rank], self._lines.find_gone()
        if len(gone) == 1:  # with several, the first death caused the others
            return PeerError(f"rank {gone[0]} died while rank {me} waited for it in {operation}", operation, peer=gone[0], died=True)
        return PeerError(f"rank {me} waited in {operation} for a rank that died or stopped: {error}", operation)
