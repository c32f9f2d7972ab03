"""Shape and type of a stored tensor."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Shape and type of one tensor as `read_rows` gives it."""

    shape: tuple[int, ...]
    """Full shape, rows first."""
    dtype: torch.dtype
    """Type of the elements."""

    @property
    def dtype_name(self) -> str:
        """The type by PyTorch's name, without `torch.`."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def num_bytes(self) -> int:
        """Size of the whole tensor, bytes."""
        count = self.dtype.itemsize
        for size in self.shape:
            count *= size
        return count
