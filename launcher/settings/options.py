"""What command lines say, as plain values; None is not said. Knows no command and no PyTorch."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointOptions:
    """What the command line says of a checkpoint; None is not said."""

    config: Path | None = None
    checkpoint: Path | None = None
    format: str | None = None
    key_file: Path | None = None
    verify: bool = False
    """Hold the files against their recorded checksums first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions(CheckpointOptions):
    """What the command line of any run says; None is not said."""

    workers: int | None = None
    dtype: str | None = None
    device: str | None = None
    threads_per_rank: int | None = None
    collectives: str | None = None
    kv_cache_dtype: str | None = None
    max_batch_size: int | None = None
    block_size: int | None = None
    num_blocks: int | None = None
    prefix_cache: bool | None = None
    speculate: bool | None = None
    log_dir: Path | None = None
    max_restarts: int | None = None
    timeout_seconds: float | None = None
    bind_cores: str | None = None
    num_nodes: int | None = None
    node_rank: int | None = None
    local_workers: int | None = None
    master_addr: str | None = None
    master_port: int | None = None
