"""What a run is: everything that its ranks need, decided and checked before any of them starts.

A plain value that travels as JSON (`launcher/job/codec.py`) from the parent to the ranks. Knows no text: prompts are ids already.
"""

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from launcher.job.tasks import Task
from model.checkpoint.fingerprint import Fingerprint
from model.checkpoint.formats import OpenOptions

_LOCAL_FIELDS = ("checkpoint", "opening", "fingerprint", "timeout_seconds", "threads_per_rank", "bind_cores", "task")
"""Fields that may differ between ranks of one run; of the fingerprint the content is compared."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One run."""

    checkpoint: str
    """Absolute path."""
    opening: OpenOptions
    """What was said of it: format, key, and what stands for config.json where it has none."""
    fingerprint: Fingerprint
    """Of the checkpoint, on this host, when the run began."""
    kv_cache: str | None
    """A kv_cache word of model/spec/scheme.py; goes over the checkpoint's."""
    world_size: int
    """Ranks."""
    context_tokens: int
    """Longest sequence."""
    eos_token_ids: tuple[int, ...]
    """Ids that end a sequence."""
    pad_token_id: int | None
    """Id that fills rows; MindFormers' repetition penalty counts it."""
    dtype: str
    """Compute type: float32, bfloat16 or float16."""
    device: str
    """cpu, or an accelerator's device type."""
    collectives: str
    """auto, shm, gloo or nccl."""
    threads_per_rank: int | None
    """None: the cores at hand, shared evenly."""
    bind_cores: bool
    """Whether each rank keeps to cores of its own."""
    timeout_seconds: float
    """A step without progress of a peer for so long ends the run."""
    max_batch_size: int
    """Sequences that go through the model together."""
    block_size: int
    """Tokens of a block of keys and values."""
    num_blocks: int | None
    """Such blocks at most; None, and never more: as many as the requests at hand can use at once."""
    prefix_cache: bool
    """Whether equal beginnings of sequences are kept once."""
    speculate: bool
    """Whether tokens of greedy sequences are guessed, and several verified in a pass."""
    task: Task
    """What to do."""

    @property
    def shared_settings(self) -> dict[str, Any]:
        """What ranks and nodes of a run have to have alike; each finds the checkpoint where it is, and rank 0 decides the task."""
        shared = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in _LOCAL_FIELDS}
        settings: dict[str, Any] = json.loads(json.dumps(shared | {"fused_order": self.opening.fused_order}))
        return settings

    @property
    def path(self) -> Path:
        """The checkpoint."""
        return Path(self.checkpoint)
