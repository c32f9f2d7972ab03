"""Choice of the collectives of a run, from the job and the placement of its ranks."""

from collections import defaultdict

import torch

from launcher.host.shared_memory import find_word_access, shared_memory_works
from launcher.job.job import Job
from launcher.rendezvous.placement import RankPlacement
from model.backends.registry import find_backend
from parallel.collectives import Collectives, GlooCollectives, IdentityCollectives
from parallel.device_collectives import DeviceCollectives, StagedCollectives
from parallel.errors import RunError
from parallel.node_collectives import NodeCollectives
from parallel.shared_memory import SharedMemoryCollectives
from parallel.store_waiting import wait_for_ranks
from parallel.torch_internals import PrefixStore, Store

DEVICE_GROUPS = ("nccl",)
"""Values of `--collectives` that name a group of devices."""


def connect(job: Job, seat: RankPlacement, store: Store | None, wait_seconds: float, device: torch.device) -> Collectives:
    """Return the collectives of this rank on `device`: those the job names, otherwise the best for the placement.

    Raises RunError if more ranks than the job allows have the same device.
    """
    if seat.world_size == 1:
        return IdentityCollectives()
    assert store is not None
    if find_backend(job.device).in_host_memory:
        return _connect_hosts(job.collectives, seat, store, wait_seconds)
    sharing = _count_sharing(job, seat, store, wait_seconds, device)
    if sharing > job.ranks_per_device:
        raise RunError(
            f"{sharing} ranks have the same {job.device} device, but --ranks-per-device is {job.ranks_per_device}: "
            f"give each its own, or allow it with --ranks-per-device {sharing}"
        )
    uses_devices = job.collectives in DEVICE_GROUPS or (job.collectives == "auto" and sharing == 1)
    if uses_devices and sharing > 1:
        raise RunError(f"collectives {job.collectives} need a device for each rank, but {sharing} ranks share one; use --collectives auto")
    host = _connect_hosts("auto" if uses_devices else job.collectives, seat, PrefixStore("host", store), wait_seconds)
    if not uses_devices:
        return StagedCollectives(host)
    name = torch.distributed.get_default_backend_for_device(device) if job.collectives == "auto" else job.collectives
    return DeviceCollectives(host, PrefixStore("device", store), name, device, wait_seconds, seat.address)


def _connect_hosts(name: str, seat: RankPlacement, store: Store, wait_seconds: float) -> Collectives:
    """Return the collectives for tensors in host memory."""
    if name == "auto":
        name = choose_collectives(seat)
    if name == "shm+gloo":
        return NodeCollectives(store, seat.rank, seat.nodes, wait_seconds, seat.address, find_word_access())
    if name == "shm":
        if seat.num_nodes > 1:
            raise RunError(f"collectives shm work inside one host, but the ranks are on {seat.num_nodes}; use --collectives auto")
        return SharedMemoryCollectives(store, seat.rank, seat.world_size, wait_seconds, access=find_word_access())
    return GlooCollectives(store, seat.rank, seat.world_size, wait_seconds, seat.address)


def choose_collectives(seat: RankPlacement) -> str:
    """Choose shared memory within one host, gloo between hosts."""
    if shared_memory_works():
        if seat.num_nodes == 1:
            return "shm"
        if seat.num_nodes < seat.world_size:
            return "shm+gloo"
    return "gloo"


def _count_sharing(job: Job, seat: RankPlacement, store: Store, wait_seconds: float, device: torch.device) -> int:
    """Return the largest number of ranks with one device. A launcher may show all its ranks the same device as their first."""
    name = find_backend(job.device).identify(device)
    store.set(f"device/{seat.rank}", f"rank {seat.rank}" if name is None else name)
    wait_for_ranks(store, "device", range(seat.world_size), wait_seconds, "rendezvous")
    ranks: defaultdict[tuple[int, bytes], int] = defaultdict(int)
    for rank, node in enumerate(seat.nodes):
        ranks[node, store.get(f"device/{rank}")] += 1
    return max(ranks.values())
