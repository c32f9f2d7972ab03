"""What this project uses of PyTorch beyond its documented interfaces, in one place, so that a new release is checked against one module."""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import AllgatherOptions, FileStore, TCPStore
from torch.distributed.distributed_c10d import PrefixStore, Store

__all__ = ["FileStore", "PrefixStore", "Store", "TCPStore", "gather_bytes", "open_gloo_group", "quantize_rows"]

_GATHER = AllgatherOptions()
_GATHER.timeout = timedelta(days=1000)
"""Disables gloo's own time limit, which includes time during which this process was frozen."""


def open_gloo_group(store: Store, rank: int, world_size: int, timeout: timedelta, address: str) -> Any:
    """Open a gloo group that listens on `address`, which torch.distributed's own functions do not let one choose."""
    options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._timeout = timeout
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=address)]
    return dist.ProcessGroupGloo(store, rank, world_size, options)


def gather_bytes(group: Any, received: Sequence[torch.Tensor], sent: torch.Tensor) -> Any:
    """Begin to gather `sent` of every rank of a group into `received`, without gloo's own time limit; returns the pending work."""
    return group.allgather([list(received)], [sent], _GATHER)


def quantize_rows(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Wrap int8 rows [rows, columns] and their scales [rows] as the quantized tensor that torch.ops.quantized takes."""
    zero_points = torch.zeros(weight.shape[0], dtype=torch.long)
    return torch._make_per_channel_quantized_tensor(weight, scale.double(), zero_points, 0)
