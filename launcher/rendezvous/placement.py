"""The ranks of a run tell each other where they are, before they do anything else: which share a host, and whether all mean the same job.

Knows the store and hosts; not who started the ranks, and not what they will do.
"""

import json
import os
import socket
from dataclasses import dataclass
from pathlib import Path

from torch.distributed.distributed_c10d import Store

from launcher.rendezvous.key_value_store import find_own_address
from parallel.errors import RunError
from parallel.node_collectives import plan_nodes
from parallel.store_waiting import wait_for_ranks


@dataclass(frozen=True, slots=True, kw_only=True)
class Seat:
    """Where one rank sits among the others."""

    rank: int
    """Number of this rank."""
    nodes: tuple[int, ...] = (0,)
    """Number of every rank's host, by first appearance."""
    host_names: tuple[str, ...] = ("",)
    """What every rank's host calls itself."""
    pids: tuple[int, ...] = (0,)
    """Process id of every rank, on its host."""
    address: str = "127.0.0.1"
    """Address of this host by which the others reach it."""
    shares_cores: bool = False
    """Whether another rank may run on this one's cores; launchers can have given each its own."""

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return len(self.nodes)

    @property
    def local_ranks(self) -> tuple[int, ...]:
        """The ranks of this host."""
        return tuple(rank for rank, node in enumerate(self.nodes) if node == self.nodes[self.rank])

    @property
    def local_rank(self) -> int:
        """Number of this rank on its host."""
        return self.local_ranks.index(self.rank)

    @property
    def num_nodes(self) -> int:
        """Hosts."""
        return len(set(self.nodes))


def find_alone() -> Seat:
    """The seat of the only rank."""
    return Seat(rank=0, host_names=(socket.gethostname(),), pids=(os.getpid(),))


def meet(store: Store, rank: int, world_size: int, master_addr: str, job_digest: str, timeout_seconds: float) -> Seat:
    """Wait for all ranks; give this one's seat. Raises PeerError for a rank that does not come, RunError for one with another job."""
    cores = os.sched_getaffinity(0)
    mine = {"host": _identify_host(), "name": socket.gethostname(), "pid": os.getpid(), "job": job_digest, "cores": sorted(cores)}
    store.set(f"seat/{rank}", json.dumps(mine))
    wait_for_ranks(store, "seat", range(world_size), timeout_seconds, "rendezvous")
    seats = [json.loads(store.get(f"seat/{other}")) for other in range(world_size)]
    for other, seat in enumerate(seats):
        if seat["job"] != job_digest:
            raise RunError(f"rank {other} was started for another job than rank {rank}: start all with the same options")
    nodes = plan_nodes([seat["host"] for seat in seats])
    return Seat(
        rank=rank,
        nodes=tuple(nodes),
        host_names=tuple(seat["name"] for seat in seats),
        pids=tuple(seat["pid"] for seat in seats),
        shares_cores=any(cores & set(seat["cores"]) for other, seat in enumerate(seats) if other != rank and nodes[other] == nodes[rank]),
        address="127.0.0.1" if len(set(nodes)) == 1 else find_own_address(master_addr),
    )


def _identify_host() -> str:
    """Equal in two processes that can share memory and see each other: the same boot, and the same name spaces."""
    spaces = [os.readlink(f"/proc/self/ns/{space}") for space in ("pid", "net")]
    return " ".join([Path("/proc/sys/kernel/random/boot_id").read_text().strip(), *spaces])
