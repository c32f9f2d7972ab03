"""Collectives of CPU ranks on several hosts: shared memory within a host, gloo between the first ranks of the hosts.

Each part crosses between two hosts only once, however many ranks they run.
"""

from collections.abc import Sequence

import torch

from parallel.collectives import GlooCollectives, IdentityCollectives
from parallel.peer_lines import PeerLines
from parallel.shared_memory import SharedMemoryCollectives
from parallel.shared_words import WordAccess
from parallel.store_waiting import StoreBarrier, StoreBeats
from parallel.torch_internals import PrefixStore, Store


def number_nodes(hosts: Sequence[str]) -> list[int]:
    """Return the node of every rank, numbered by first appearance, given an identifier of each rank's host."""
    numbers: dict[str, int] = {}
    return [numbers.setdefault(host, len(numbers)) for host in hosts]


class NodeCollectives:
    """Gather within each host, between the hosts, then within each host again.

    `nodes[r]` is the node of rank r; `access`: see SharedMemoryCollectives.
    """

    name = "shm+gloo"

    def __init__(
        self, store: Store, rank: int, nodes: Sequence[int], timeout_seconds: float, address: str, access: WordAccess | None = None
    ) -> None:
        self.rank, self.world_size = rank, len(nodes)
        self._members = [[other for other in range(len(nodes)) if nodes[other] == node] for node in range(max(nodes) + 1)]
        self._node = nodes[rank]
        mates = self._members[self._node]
        self._mates = mates
        self._beats = StoreBeats(store, rank)
        # Connects all ranks, not only the first of each node: the others would otherwise not learn of a death on another node.
        self._lines = PeerLines(store, rank, range(self.world_size), address, timeout_seconds)
        self._barrier = StoreBarrier(store, rank, range(self.world_size), timeout_seconds, self._lines.find_gone)
        self._local: IdentityCollectives | SharedMemoryCollectives = IdentityCollectives()
        if len(mates) > 1:
            inside = PrefixStore(f"node_{self._node}", store)
            self._local = SharedMemoryCollectives(inside, mates.index(rank), len(mates), timeout_seconds, ranks=mates, access=access)
        self._between: GlooCollectives | None = None
        if rank == mates[0] and len(self._members) > 1:
            between = PrefixStore("leaders", store)
            self._between = GlooCollectives(
                between, self._node, len(self._members), timeout_seconds, address, ranks=[members[0] for members in self._members]
            )
        # Columns arrive grouped by node; this permutation restores rank order.
        self._order = [other for members in self._members for other in members]
        self._is_ordered = self._order == sorted(self._order)

    def gather_columns(self, local: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        """Join [rows, sizes[rank]] of every rank into [rows, sum(sizes)]."""
        block = self._local.gather_columns(local, [sizes[mate] for mate in self._mates])
        if len(self._members) == 1:
            return block
        total = sum(sizes)
        if self._between is not None:
            widths = [sum(sizes[member] for member in members) for members in self._members]
            whole = self._between.gather_columns(block, widths)
            if not self._is_ordered:
                parts = dict(zip(self._order, torch.split(whole, [sizes[other] for other in self._order], dim=1), strict=True))
                whole = torch.cat([parts[other] for other in range(self.world_size)], dim=1)
            column = whole.reshape(-1, 1)
        else:
            column = local.new_empty((local.shape[0] * total, 0))
        # A gather in which only the first rank has columns is a broadcast. It is sent as a single column, since a row of all ranks' columns
        # may exceed a slot.
        return self._local.gather_columns(column, [1, *[0] * (len(self._mates) - 1)]).view(local.shape[0], total)

    def barrier(self) -> None:
        """Block until every rank has reached the barrier."""
        self._barrier.wait()

    def beat(self) -> None:
        """Signal the peers that this rank is alive."""
        self._beats.beat()
        self._local.beat()

    def close(self) -> None:
        """Release the resources of both levels."""
        self._lines.close()
        self._local.close()
        if self._between is not None:
            self._between.close()
