"""Warning, before a run starts, that its ranks will not fit in this host's memory."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from launcher.host.control_groups import read_memory_group
from launcher.host.cores import share_cores
from launcher.job.job import Job
from launcher.job.tasks import Bench, Decode, Serve
from model.backends.device_types import is_host_memory
from model.kernels.library import find_kernels
from model.planning import RankPlan, Workload


def forecast_memory(job: Job, plan: Callable[[Workload], list[RankPlan]], local_workers: int) -> str | None:
    """Return a warning if decoding on this host's ranks, which `plan` plans, is expected to exceed the available memory, otherwise None."""
    available = read_available_bytes()
    sequences = _plan_sequences(job)
    if sequences is None or not is_host_memory(job.device) or available is None:
        return None
    workload = Workload(
        own_kernels=find_kernels() is not None,
        dtype=job.dtype,
        kv_cache=job.kv_cache,
        batch_size=min(job.max_batch_size, sequences[0]),
        tokens=sequences[1],
        num_threads=job.threads_per_rank or share_cores(local_workers),
        block_size=job.block_size,
        num_blocks=job.task.num_blocks if isinstance(job.task, Serve) else job.num_blocks,
    )
    needed = sum(sorted(rank.peak_bytes for rank in plan(workload))[-local_workers:])
    if needed <= available:
        return None
    return (
        f"{local_workers} ranks on this host need about {needed / 1e9:.1f} GB at their peak, but {available / 1e9:.1f} GB are free: "
        "the kernel may kill one; see tandem plan, int8, a smaller --max-batch-size, or more nodes"
    )


def _plan_sequences(job: Job) -> tuple[int, int] | None:
    """Return the number of sequences a task decodes and the length of the longest in tokens; None if it decodes none."""
    task = job.task
    if isinstance(task, Serve):
        return job.max_batch_size, job.context_tokens
    if isinstance(task, Decode):
        return len(task.requests), max(len(request.prompt_ids) + request.params.max_new_tokens for request in task.requests)
    if isinstance(task, Bench):
        return max(task.batch_sizes), max(task.prompt_tokens, task.new_tokens)
    return None


def read_available_bytes() -> int | None:
    """Return the memory available from the system and within the control group's limit; None if unknown."""
    available = None
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1]) * 1024
    limit = read_memory_group().limit_bytes
    return min((number for number in (available, limit) if number is not None), default=None)
