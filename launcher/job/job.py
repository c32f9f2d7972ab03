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

_LOCAL_FIELDS = (
    "checkpoint",
    "opening",
    "fingerprint",
    "timeout_seconds",
    "join_seconds",
    "threads_per_rank",
    "bind_cores",
    "cpu_kernels",
    "draft",
    "task",
)
"""Fields that may differ between the ranks of a run; of the fingerprints, only the content is compared."""


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
    collectives: str
    """"auto", "shm", "gloo" or "nccl"."""
    threads_per_rank: int | None
    """None shares the available cores evenly."""
    cpu_kernels: str
    """"auto", "none", or the instruction set of the kernels; see model/kernels/library.py."""
    bind_cores: bool
    """Whether each rank is pinned to its own cores."""
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

    @property
    def shared_settings(self) -> dict[str, Any]:
        """Return the settings that must be equal on all ranks and nodes; the checkpoint's path is local, and rank 0 determines the task."""
        shared = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in _LOCAL_FIELDS}
        settings: dict[str, Any] = json.loads(json.dumps(shared | {"fused_order": self.opening.fused_order}))
        return settings

    @property
    def path(self) -> Path:
        """Path of the checkpoint."""
        return Path(self.checkpoint)
