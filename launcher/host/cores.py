"""How many processor cores there are for this process, and for each rank. Knows the system, no settings."""

import os
from contextlib import suppress
from pathlib import Path


def count_cores() -> int:
    """Cores that this process may use: its affinity, and the quota of its control group where there is one."""
    cores = len(os.sched_getaffinity(0))
    with suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, max(1, int(quota) // int(period)))
    return cores


def share_cores(local_world_size: int) -> int:
    """Threads of each of the ranks on this host."""
    return max(1, count_cores() // local_world_size)


def bind_cores(local_rank: int, local_world_size: int) -> None:
    """Keep this process on its own run of this host's cores. More ranks than cores stay unbound."""
    cores = sorted(os.sched_getaffinity(0))
    first, end = local_rank * len(cores) // local_world_size, (local_rank + 1) * len(cores) // local_world_size
    if first < end:
        os.sched_setaffinity(0, cores[first:end])
