"""How much KV cache fits into the memory of a device next to a rank's weights."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from model.planning import RankPlan
from parallel.errors import ConfigError

DEFAULT_MEMORY_FRACTION = 0.9
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30, "ti": 1 << 40}


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceFit:
    """What the fullest rank needs of its device, and what is left for the KV cache."""

    rank: int
    """The fullest rank."""
    budget_bytes: int
    """What a rank may use."""
    needed_bytes: int
    """Its weights and the activations of prefill."""
    block_bytes: int
    """One block of its KV cache."""

    @property
    def num_blocks(self) -> int:
        """Number of blocks that every rank can have; 0 or less if the model does not fit."""
        return (self.budget_bytes - self.needed_bytes) // self.block_bytes


def fit_ranks(plans: Sequence[RankPlan], cached_tokens: int, block_size: int, budget_bytes: int) -> DeviceFit:
    """Fit the ranks of a plan, made for a KV cache of `cached_tokens`, into `budget_bytes` each."""
    fits = [
        DeviceFit(
            rank=plan.rank,
            budget_bytes=budget_bytes,
            needed_bytes=plan.weight_bytes + plan.activation_bytes,
            block_bytes=plan.kv_cache_bytes * block_size // cached_tokens,
        )
        for plan in plans
    ]
    return min(fits, key=lambda fit: fit.num_blocks)


def parse_bytes(name: str, text: str) -> int:
    """Return the bytes of a size such as 80GB, 64GiB or 500000000. Raises ConfigError, which names the option."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]i?|)b?", text.strip().lower())
    size = int(float(found[1]) * _UNITS[found[2]]) if found else 0
    if size <= 0:
        raise ConfigError(f"{name} is {text!r}, but has to be a size such as 80GB or 64GiB")
    return size
