"""How ranks speak: gather what every rank computed, in rank order. Nothing is ever summed on the way.

One interface, three backs: identity (one rank), shared memory (`parallel/shared_memory.py`), torch.distributed.
Knows tensors and ranks; not what they mean, and not how processes were started.
"""

from collections.abc import Sequence
from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from parallel.errors import PeerError


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

    def close(self) -> None:
        """Nothing to let go of."""


class DistributedCollectives:
    """torch.distributed: gloo on CPUs, the device's own backend elsewhere."""

    def __init__(self, store: Store, rank: int, world_size: int, backend: str, timeout_seconds: float) -> None:
        self.name, self.rank, self.world_size = backend, rank, world_size
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout_seconds))

    def gather_columns(self, local: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        """Join [rows, sizes[rank]] of every rank into [rows, sum(sizes)].

        Parts go as bytes, filled up to the widest: backends differ in the types and the uneven sizes that they take.
        """
        rows, widest = local.shape[0], max(sizes)
        mine = local.new_zeros((rows, widest))
        mine[:, : local.shape[1]] = local
        parts = [torch.empty_like(mine) for _ in sizes]
        try:
            dist.all_gather([part.view(torch.uint8) for part in parts], mine.view(torch.uint8))
        except RuntimeError as error:
            raise PeerError(
                f"rank {self.rank} waited in gather_columns for a rank that died or stopped: {error}", "gather_columns"
            ) from error
        return torch.cat([part[:, :size] for part, size in zip(parts, sizes, strict=True)], dim=1)

    def barrier(self) -> None:
        """Return when every rank has come here."""
        try:
            dist.barrier()
        except RuntimeError as error:
            raise PeerError(f"rank {self.rank} waited in barrier for a rank that died or stopped: {error}", "barrier") from error

    def close(self) -> None:
        """Leave the process group."""
        dist.destroy_process_group()
