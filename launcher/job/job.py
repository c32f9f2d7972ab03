"""The job of a run: everything its ranks need, resolved and validated before any of them starts.

A plain value, sent as JSON (`launcher/job/codec.py`) from the parent to the ranks. Prompts are already tokenized.
"""

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from launcher.job.tasks import Task
from model.checkpoint.fingerprint import Fingerprint
from model.checkpoint.formats import OpenOptions
from model.engine.speculation import DEFAULT_DRAFT_TOKENS
from model.spec.config import LlamaConfig
from model.spec.run_scheme import plan_run_scheme
from model.spec.scheme import Scheme

_LOCAL_FIELDS = (
    "checkpoint",
    "opening",
    "fingerprint",
    "timeout_seconds",
    "join_seconds",
    "threads_per_rank",
    "bind_cores",
    "cores",
    "cpu_kernels",
    "draft",
    "task",
    "fitting_blocks",
    "adapters",
)
"""Fields that may differ between the ranks of a run; of the fingerprints, only the content is compared."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA adapter that all ranks load."""

    name: str
    """By which requests choose it."""
    path: str
    """Absolute path of its folder."""
    fingerprint: Fingerprint
    """Fingerprint of the folder on this host at the start of the run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftCheckpoint:
    """The checkpoint of a draft model; the fields mean the same as those of Job."""

    checkpoint: str
    opening: OpenOptions
    fingerprint: Fingerprint
    kv_cache: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One run."""

    checkpoint: str
    """Absolute path."""
    opening: OpenOptions
    """How to open it: format, key, and the substitute for a missing config.json."""
    fingerprint: Fingerprint
    """Fingerprint of the checkpoint on this host at the start of the run."""
    kv_cache: str | None
    """A kv_cache name of model/spec/scheme.py; overrides the checkpoint's."""
    activations: str = "auto"
    """Precision of the inputs of integer linears: one of model/spec/run_scheme.py."""
    lm_head: str = "auto"
    """Precision of the output head: one of model/spec/run_scheme.py."""
    world_size: int
    """Number of ranks."""
    context_tokens: int
    """Maximum sequence length."""
    eos_token_ids: tuple[int, ...]
    """Token ids that end a sequence."""
    pad_token_id: int | None
    """Padding token id; MindFormers' repetition penalty counts it."""
    dtype: str
    """Compute dtype: float32, bfloat16 or float16."""
    device: str
    """"cpu", or an accelerator's device type."""
    ranks_per_device: int = 1
    """Maximum number of ranks that share a device outside host memory."""
    collectives: str
    """"auto", "shm", "gloo" or "nccl"."""
    threads_per_rank: int | None
    """None shares the available cores evenly."""
    cpu_kernels: str
    """"auto", "none", or the instruction set of the kernels; see model/kernels/library.py."""
    bind_cores: bool | None
    """Whether each rank is bound to its share of the cores that it may use. None: to `cores`, if there are any."""
    cores: tuple[tuple[int, ...], ...] | None = None
    """The cores of each rank that this node starts, which no other run has claimed; None: ranks are not bound to such cores."""
    timeout_seconds: float
    """Maximum time without progress of a peer; exceeding it ends the run."""
    join_seconds: float | None = None
    """Maximum wait of a launcher's rank for the others at the start; None: timeout_seconds."""
    max_batch_size: int
    """Maximum number of sequences per batch."""
    block_size: int
    """Tokens per KV cache block."""
    num_blocks: int | None
    """Maximum number of KV cache blocks, further limited to what the current requests can use; None sets only the latter limit."""
    fitting_blocks: int | None = None
    """Number of KV cache blocks that fit into the free memory of this host's devices; None on CPUs."""
    prefix_cache: bool
    """Whether sequences share the KV cache of equal prefixes."""
    speculate: bool
    """Whether greedy sequences use speculative decoding with n-grams."""
    draft: DraftCheckpoint | None = None
    """The model that drafts tokens for all sequences, if any."""
    draft_tokens: int = DEFAULT_DRAFT_TOKENS
    """Maximum tokens that it drafts per pass."""
    task: Task
    """The task of the ranks."""
    adapters: tuple[Adapter, ...] = ()
    """LoRA adapters of which each request may use one."""

    @property
    def shared_settings(self) -> dict[str, Any]:
        """Return the settings that must be equal on all ranks and nodes; the checkpoint's path is local, and rank 0 determines the task."""
        shared = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in _LOCAL_FIELDS}
        adapters = [[adapter.name, adapter.fingerprint.content] for adapter in self.adapters]
        settings: dict[str, Any] = json.loads(json.dumps(shared | {"fused_order": self.opening.fused_order, "adapters": adapters}))
        return settings

    def plan_scheme(self, config: LlamaConfig, stored: Scheme) -> Scheme:
        """Return the scheme of this run, whose checkpoint declares `stored`. Raises ConfigError if they do not fit together."""
        tied = config.tie_word_embeddings
        return plan_run_scheme(stored, tied=tied, kv_cache=self.kv_cache, activations=self.activations, lm_head=self.lm_head)

    @property
    def binds_cores(self) -> bool:
        """Whether each rank is bound to cores."""
        return bool(self.bind_cores) or self.cores is not None

    @property
    def block_limit(self) -> int | None:
        """Maximum number of KV cache blocks on this host; None if only requests limit it."""
        return min((count for count in (self.num_blocks, self.fitting_blocks) if count is not None), default=None)

    @property
    def path(self) -> Path:
        """Path of the checkpoint."""
        return Path(self.checkpoint)
