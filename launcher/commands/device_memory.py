"""The number of KV cache blocks of a job whose ranks are on devices."""

from collections.abc import Callable, Sequence

from launcher.job.device_memory import fit_ranks
from launcher.job.job import Job
from model.backends.device_types import keeps_integers_packed
from model.planning import RankPlan, Workload
from parallel.errors import ConfigError


def fit_blocks(job: Job, plan_ranks: Callable[[Workload], Sequence[RankPlan]], rank_bytes: int, fraction: float) -> int:
    """Return the number of blocks that every rank can have if each may use `fraction` of `rank_bytes`.

    `plan_ranks` plans the ranks of the run, with a draft model if there is one.
    Raises ConfigError if not one fits next to the weights and the activations of prefill.
    """
    workload = Workload(
        own_kernels=keeps_integers_packed(job.device),
        dtype=job.dtype,
        kv_cache=job.kv_cache,
        batch_size=job.max_batch_size,
        tokens=job.context_tokens,
        block_size=job.block_size,
        num_blocks=1,
    )
    fit = fit_ranks(plan_ranks(workload), workload.cached_tokens, job.block_size, int(fraction * rank_bytes))
    if fit.num_blocks < 1:
        raise ConfigError(
            f"rank {fit.rank} needs {(fit.needed_bytes + fit.block_bytes) / 1e9:.2f} GB of device memory for its weights, activations and "
            f"a KV cache block, but may use {fit.budget_bytes / 1e9:.2f} GB (--memory-fraction {fraction:g}): use more ranks, int8, or "
            "fewer ranks per device"
        )
    return fit.num_blocks
