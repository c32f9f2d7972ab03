"""Choice of the collectives of a run, from the job and the placement of its ranks."""

import torch

from launcher.host.shared_memory import shared_memory_works
from launcher.job.job import Job
from launcher.rendezvous.placement import RankPlacement
from model.backends.registry import find_backend
from parallel.collectives import Collectives, DistributedCollectives, IdentityCollectives
from parallel.errors import RunError
from parallel.node_collectives import NodeCollectives
from parallel.shared_memory import SharedMemoryCollectives
from parallel.torch_internals import Store


def connect(job: Job, seat: RankPlacement, store: Store | None, wait_seconds: float) -> Collectives:
    """Return this rank's collectives: those the job names, otherwise the best for the placement."""
    if seat.world_size == 1:
        return IdentityCollectives()
    assert store is not None
    name = job.collectives
    if name == "auto":
        name = choose_collectives(job.device, seat)
    if name == "shm+gloo":
        return NodeCollectives(store, seat.rank, seat.nodes, wait_seconds, seat.address)
    if name == "shm":
        if seat.num_nodes > 1:
            raise RunError(f"collectives shm work inside one host, but the ranks are on {seat.num_nodes}; use --collectives auto")
        return SharedMemoryCollectives(store, seat.rank, seat.world_size, wait_seconds)
    return DistributedCollectives(store, seat.rank, seat.world_size, name, wait_seconds, seat.address)


def choose_collectives(device: str, seat: RankPlacement) -> str:
    """Choose shared memory for CPU ranks on one x86-64 host, gloo between such hosts, otherwise torch.distributed's default for the
    device."""
    if find_backend(device).in_host_memory and shared_memory_works():
        if seat.num_nodes == 1:
            return "shm"
        if seat.num_nodes < seat.world_size:
            return "shm+gloo"
    return torch.distributed.get_default_backend_for_device(torch.device(device))
