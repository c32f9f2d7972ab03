"""How many KV cache blocks fit into the memory of a device next to a rank's weights."""

from launcher.job.job import Job
from model.planning import RankPlan, Workload, plan_ranks
from model.spec.config import LlamaConfig
from model.spec.scheme import Scheme
from model.spec.stored_form import StoredForm
from parallel.errors import ConfigError


def fit_blocks(job: Job, config: LlamaConfig, scheme: Scheme, stored: dict[str, StoredForm], rank_bytes: int, fraction: float) -> int:
    """Return the number of blocks that every rank can have if each may use `fraction` of `rank_bytes`.

    Raises ConfigError if not one fits next to the weights and the activations of prefill.
    """
    workload = Workload(
        own_kernels=False,
        dtype=job.dtype,
        kv_cache=job.kv_cache,
        batch_size=job.max_batch_size,
        tokens=job.context_tokens,
        block_size=job.block_size,
        num_blocks=1,
    )
    budget = int(fraction * rank_bytes)
    fullest = max(plan_ranks(config, scheme, job.world_size, workload, stored), key=_measure)
    left = budget - fullest.weight_bytes - fullest.activation_bytes
    num_blocks = left // fullest.kv_cache_bytes
    if num_blocks < 1:
        raise ConfigError(
            f"rank {fullest.rank} needs {_measure(fullest) / 1e9:.2f} GB of device memory for its weights, activations and one block of KV "
            f"cache, but may use {budget / 1e9:.2f} GB (--memory-fraction {fraction:g}): use more ranks, int8, or fewer ranks per device"
        )
    return num_blocks


def _measure(plan: RankPlan) -> int:
    return plan.weight_bytes + plan.activation_bytes + plan.kv_cache_bytes
