"""How ranks speak: gather what every rank computed, in rank order. Nothing is ever summed on the way.

One interface, three backs: identity (one rank), shared memory (`parallel/shared_memory.py`), torch.distributed.
Knows tensors and ranks; not what they mean, and not how processes were started.
"""

import ctypes
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import AllgatherOptions
from torch.distributed.distributed_c10d import Store

from parallel.errors import PeerError
from parallel.observed_time import ObservedTime
from parallel.peer_lines import PeerLines
from parallel.store_waiting import StoreBarrier, StoreBeats

_LOOK = timedelta(seconds=0.5)
_NEVER = timedelta(days=1000)
"""For gloo's own time limits, which count the time in which this process was frozen."""


class Collectives(Protocol):
    """What a rank needs of the others."""

    name: str
    rank: int
    world_size: int

    def gather_columns(self, local: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        """Join [rows, sizes[rank]] of every rank into [rows, sum(sizes)]. Every rank gets the same bits."""
        ...

    def barrier(self) -> None:
        """Return when every rank has come here."""
        ...

    def beat(self) -> None:
        """Tell the peers that this rank is at work, loading or computing, so that they go on waiting for it."""
        ...

    def close(self) -> None:
        """Let go of what the back holds."""
        ...


class IdentityCollectives:
    """One rank: nothing to do."""

    name = "identity"
    rank = 0
    world_size = 1

    def gather_columns(self, local: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        """The tensor itself."""
        return local

    def barrier(self) -> None:
        """Nothing to wait for."""

    def beat(self) -> None:
        """Nobody waits."""

    def close(self) -> None:
        """Nothing to let go of."""


class DistributedCollectives:
    """torch.distributed: gloo on CPUs, the device's own backend elsewhere. Barriers go by the store, whose wait can be prolonged.

    `address`: of this host, on which this rank listens, and nowhere else. `ranks`: what these ranks are called in messages, where they are
    a part of a run's.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        world_size: int,
        backend: str,
        timeout_seconds: float,
        address: str = "127.0.0.1",
        *,
        ranks: Sequence[int] | None = None,
    ) -> None:
        self.name, self.rank, self.world_size = backend, rank, world_size
        self._ranks = list(range(world_size)) if ranks is None else list(ranks)
        me = self._ranks[rank]
        self._beats = StoreBeats(store, me)
        timeout, self._timeout_seconds = timedelta(seconds=timeout_seconds), timeout_seconds
        self._options = AllgatherOptions()
        self._options.timeout = _NEVER
        self._group: Any = None
        # All are there before they connect to each other: what waits for a late one then is a wait that can name it.
        self._lines = PeerLines(store, me, self._ranks, address, timeout_seconds)
        self._barrier = StoreBarrier(store, me, self._ranks, timeout_seconds, self._lines.find_gone)
        try:
            if backend == "gloo":
                options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
                options._timeout = timeout
                options._devices = [dist.ProcessGroupGloo.create_device(hostname=address)]
                self._group = dist.ProcessGroupGloo(store, rank, world_size, options)
            else:
                dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
        except RuntimeError as error:
            raise self._fail("connect", error) from error

    def gather_columns(self, local: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        """Join [rows, sizes[rank]] of every rank into [rows, sum(sizes)].

        Parts go as bytes, filled up to the widest: backends differ in the types and the uneven sizes that they take.
        """
        rows, widest = local.shape[0], max(sizes)
        mine = local.new_zeros((rows, widest))
        mine[:, : local.shape[1]] = local
        parts = [torch.empty_like(mine) for _ in sizes]
        sent, received = mine.view(torch.uint8), [part.view(torch.uint8) for part in parts]
        try:
            if self._group is not None:
                self._wait(self._group.allgather([received], [sent], self._options))
            else:
                dist.all_gather(received, sent)
        except RuntimeError as error:
            raise self._fail("gather_columns", error) from error
        return torch.cat([part[:, :size] for part, size in zip(parts, sizes, strict=True)], dim=1)

    def barrier(self) -> None:
        """Return when every rank has come here."""
        self._barrier.wait()

    def beat(self) -> None:
        """Tell the peers that this rank is at work."""
        self._beats.beat()

    def close(self) -> None:
        """Leave the process group."""
        self._lines.close()
        if self._group is None:
            dist.destroy_process_group()
        self._group = None

    def _wait(self, work: Any) -> None:
        """Return when it is done. Raises RuntimeError when it fails, or takes longer than the timeout while this process runs."""
        clock = ObservedTime()
        while True:
            try:
                work.wait(_LOOK)
                return
            except RuntimeError as error:
                if work.is_completed():
                    raise
                if clock.read() > self._timeout_seconds:
                    # gloo waits for its pending work when it is destroyed, and this work may never end: let it never be destroyed.
                    ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._group))
                    raise RuntimeError(f"no answer within {self._timeout_seconds:g} s") from error

    def _fail(self, operation: str, error: RuntimeError) -> PeerError:
        me, gone = self._ranks[self.rank], self._lines.find_gone()
        if len(gone) == 1:  # of several, one took the others with it
            return PeerError(f"rank {gone[0]} died while rank {me} waited for it in {operation}", operation, peer=gone[0], died=True)
        return PeerError(f"rank {me} waited in {operation} for a rank that died or stopped: {error}", operation)
