"""Choice of the collectives of a run, from the job and the placement of its ranks."""

import os
import platform

import torch

from launcher.job.job import Job
from launcher.rendezvous.placement import RankPlacement
from model.backends.registry import find_backend
from model.kernels.library import find_kernels
from parallel.collectives import Collectives, DistributedCollectives, IdentityCollectives
from parallel.errors import RunError
from parallel.node_collectives import NodeCollectives
from parallel.shared_memory import SharedMemoryCollectives, WordAccess
from parallel.torch_internals import Store

_ORDERED = platform.machine() in ("x86_64", "AMD64")
"""Whether this processor keeps the order of plain stores."""


def connect(job: Job, seat: RankPlacement, store: Store | None, wait_seconds: float) -> Collectives:
    """Return this rank's collectives: those the job names, otherwise the best for the placement."""
    if seat.world_size == 1:
        return IdentityCollectives()
    assert store is not None
    name = job.collectives
    if name == "auto":
        name = choose_collectives(job.device, seat)
    if name == "shm+gloo":
        return NodeCollectives(store, seat.rank, seat.nodes, wait_seconds, seat.address, find_word_access())
    if name == "shm":
        if seat.num_nodes > 1:
            raise RunError(f"collectives shm work inside one host, but the ranks are on {seat.num_nodes}; use --collectives auto")
        return SharedMemoryCollectives(store, seat.rank, seat.world_size, wait_seconds, access=find_word_access())
    return DistributedCollectives(store, seat.rank, seat.world_size, name, wait_seconds, seat.address)


def choose_collectives(device: str, seat: RankPlacement) -> str:
    """Choose shared memory for CPU ranks on one host, gloo between such hosts, otherwise torch.distributed's default for the
    device."""
    if find_backend(device).in_host_memory and shared_memory_works():
        if seat.num_nodes == 1:
            return "shm"
        if seat.num_nodes < seat.world_size:
            return "shm+gloo"
    return torch.distributed.get_default_backend_for_device(torch.device(device))


def shared_memory_works() -> bool:
    """Whether loads and stores of shared memory can be ordered, and the system supports the shared-memory backend."""
    ordered = _ORDERED or find_word_access() is not None
    return ordered and hasattr(os, "memfd_create") and hasattr(os, "pidfd_open")


def find_word_access() -> WordAccess | None:
    """Return ordered access to words of shared memory; None on x86-64, where plain access is ordered, and without native kernels."""
    kernels = None if _ORDERED else find_kernels()
    return None if kernels is None else kernels.word_access
