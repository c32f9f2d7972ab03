"""Shape and dtype of a stored tensor."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Shape and dtype of one tensor as `read_rows` returns it."""

    shape: tuple[int, ...]
    """Full shape, rows first."""
    dtype: torch.dtype
    """Element type."""

    @property
    def dtype_name(self) -> str:
        """Name of the dtype, without `torch.`."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def num_bytes(self) -> int:
        """Size of the whole tensor in bytes."""
        count = self.dtype.itemsize
        for size in self.shape:
            count *= size
        return count
