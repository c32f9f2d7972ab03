"""Number of CPU cores available to this process and to each rank."""

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path


def count_cores() -> int:
    """Return the number of cores this process may use, from its affinity and its control group's quota."""
    cores = len(os.sched_getaffinity(0))
    with suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, max(1, int(quota) // int(period)))
    return cores


def share_cores(local_world_size: int) -> int:
    """Return the number of threads for each rank on this host."""
    return max(1, count_cores() // local_world_size)


def bind_cores(local_rank: int, local_world_size: int, chosen: Sequence[int] | None = None) -> None:
    """Bind this process to the `chosen` cores, otherwise to its contiguous share of this host's.

    With more ranks than cores, nothing is bound.
    """
    if chosen is not None:
        os.sched_setaffinity(0, chosen)
        return
    cores = sorted(os.sched_getaffinity(0))
    first, end = local_rank * len(cores) // local_world_size, (local_rank + 1) * len(cores) // local_world_size
    if first < end:
        os.sched_setaffinity(0, cores[first:end])
