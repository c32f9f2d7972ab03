"""What a run is: everything that its ranks need, decided and checked before any of them starts.

A plain value that travels as JSON from the parent to the ranks. Knows no text: prompts are ids already.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launcher.job.tasks import Task, read_task, write_task
from model.checkpoint.formats import OpenOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One run."""

    checkpoint: str
    """Absolute path."""
    opening: OpenOptions
    """What was said of it: format, key, and what stands for config.json where it has none."""
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

    def to_json(self) -> str:
        """For `from_json`."""
        return json.dumps({**asdict(self), "task": write_task(self.task)})

    @classmethod
    def from_json(cls, text: str) -> "Job":
        """The inverse of `to_json`."""
        raw: dict[str, Any] = json.loads(text)
        opening = OpenOptions(**raw.pop("opening"))
        task, eos_token_ids = read_task(raw.pop("task")), tuple(raw.pop("eos_token_ids"))
        return cls(**raw, opening=opening, eos_token_ids=eos_token_ids, task=task)

    @property
    def digest(self) -> str:
        """Equal for ranks that mean the same; where each finds the checkpoint is its own affair, and what to do is rank 0's to say."""
        said = json.loads(self.to_json())
        for name in ("checkpoint", "opening", "timeout_seconds", "threads_per_rank", "bind_cores", "task"):
            del said[name]
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()

    @property
    def path(self) -> Path:
        """The checkpoint."""
        return Path(self.checkpoint)
