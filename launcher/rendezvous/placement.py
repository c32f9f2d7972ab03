"""Exchange of placements between ranks at startup: which ranks share a host, and whether all run the same job."""

import json
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from launcher.rendezvous.key_value_store import find_own_address
from launcher.rendezvous.refused_input import raise_if_refused
from launcher.rendezvous.run_identity import compare_runs
from parallel.node_collectives import number_nodes
from parallel.store_waiting import wait_for_ranks
from parallel.torch_internals import Store


@dataclass(frozen=True, slots=True, kw_only=True)
class RankPlacement:
    """The placement of one rank among the others."""

    rank: int
    """This rank."""
    nodes: tuple[int, ...] = (0,)
    """Host index of each rank, in order of first appearance."""
    host_names: tuple[str, ...] = ("",)
    """Host name of each rank."""
    pids: tuple[int, ...] = (0,)
    """Process id of each rank on its host."""
    address: str = "127.0.0.1"
    """Address of this host that the other ranks can reach."""
    shares_cores: bool = False
    """Whether another rank may run on this one's cores; some launchers assign cores to ranks."""

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return len(self.nodes)

    @property
    def local_ranks(self) -> tuple[int, ...]:
        """The ranks of this host."""
        return tuple(rank for rank, node in enumerate(self.nodes) if node == self.nodes[self.rank])

    @property
    def local_rank(self) -> int:
        """Rank on this host."""
        return self.local_ranks.index(self.rank)

    @property
    def num_nodes(self) -> int:
        """Number of hosts."""
        return len(set(self.nodes))


def find_alone() -> RankPlacement:
    """Return the placement of a single rank."""
    return RankPlacement(rank=0, host_names=(socket.gethostname(),), pids=(os.getpid(),))


def meet(store: Store, rank: int, world_size: int, master_addr: str, run: Mapping[str, Any], timeout_seconds: float) -> RankPlacement:
    """Wait for all ranks and return this one's placement. `run` holds the values that must match on all ranks, see `describe_run`.

    Raises PeerError for a rank that does not join, RefusedByRankError for one that refused its input, DifferentRunError for a rank of
    another run.
    """
    cores = os.sched_getaffinity(0)
    mine = {"host": _identify_host(), "name": socket.gethostname(), "pid": os.getpid(), "run": run, "cores": sorted(cores)}
    store.set(f"seat/{rank}", json.dumps(mine))
    wait_for_ranks(store, "seat", range(world_size), timeout_seconds, "rendezvous", partial(raise_if_refused, store))
    seats = [json.loads(store.get(f"seat/{other}")) for other in range(world_size)]
    for other, seat in enumerate(seats):
        compare_runs(f"rank {other}", seat["run"], f"rank {rank}", run)
    nodes = number_nodes([seat["host"] for seat in seats])
    return RankPlacement(
        rank=rank,
        nodes=tuple(nodes),
        host_names=tuple(seat["name"] for seat in seats),
        pids=tuple(seat["pid"] for seat in seats),
        shares_cores=any(cores & set(seat["cores"]) for other, seat in enumerate(seats) if other != rank and nodes[other] == nodes[rank]),
        address="127.0.0.1" if len(set(nodes)) == 1 else find_own_address(master_addr),
    )


def _identify_host() -> str:
    """Return an id equal in processes that can share memory and see each other: same boot, same namespaces."""
    spaces = [os.readlink(f"/proc/self/ns/{space}") for space in ("pid", "net")]
    return " ".join([Path("/proc/sys/kernel/random/boot_id").read_text().strip(), *spaces])
