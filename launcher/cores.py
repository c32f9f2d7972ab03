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
