"""Measurement of the memory bandwidth available to a run: all ranks read at once, each with all of its threads."""

import time
from collections.abc import Callable

import torch

from launcher.job.memory_forecast import read_available_bytes
from model.backends.registry import find_backend
from parallel.collectives import Collectives

_BLOCK_BYTES, _BLOCK_BYTES_A_THREAD = 512 << 20, 64 << 20
"""Several times the last-level cache of processors with up to 12 MiB per core."""
_SUMS, _TRIES = 4, 6
"""Number of sums per try, so that barriers are negligible in comparison."""


def measure_bandwidth(
    collectives: Collectives,
    gather: Callable[[list[int]], list[list[int]]],
    device: torch.device,
    num_local: int,
    threads: int,
    block_bytes: int = _BLOCK_BYTES,
) -> float:
    """Return the bytes per second that all ranks read together, best of several tries. `num_local` is the number of ranks on this host."""
    size = max(block_bytes, _BLOCK_BYTES_A_THREAD * threads)
    in_host_memory = find_backend(device.type).in_host_memory
    available = read_available_bytes() if in_host_memory else torch.accelerator.get_memory_info(device)[0]
    if available is not None:
        size = min(size, available // (4 * num_local))
    block = torch.ones(max(1, size // 4), device=device)
    seconds = []
    for _ in range(_TRIES):
        collectives.barrier()
        started = time.perf_counter()
        for _ in range(_SUMS):
            block.sum().item()
        collectives.barrier()
        seconds.append(time.perf_counter() - started)
    return _SUMS * sum(row[0] for row in gather([block.nbytes])) / min(seconds)
