"""Shape and dtype of a stored tensor."""

from __future__ import annotations

from dataclasses import dataclass

from model.spec.stored_form import StoredForm
from parallel.element_type import ElementType
from parallel.lazy_torch import torch


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Shape and dtype of one tensor as `read_rows` returns it, and how it is stored where that differs."""

    shape: tuple[int, ...]
    """Full shape, rows first."""
    dtype: ElementType
    """Element type."""
    encoding: str | None = None
    """See StoredForm."""
    row_bytes: int | None = None
    """See StoredForm."""
    unit_rows: int = 1
    """Rows that are stored in another order, and therefore always read together."""

    @classmethod
    def of(cls, tensor: torch.Tensor) -> TensorInfo:
        """Describe a tensor in memory."""
        return cls(tuple(tensor.shape), ElementType.of(tensor.dtype))

    @property
    def dtype_name(self) -> str:
        """PyTorch's name of the dtype, without `torch.`."""
        return self.dtype.label

    @property
    def form(self) -> StoredForm:
        """The stored form."""
        return StoredForm(self.dtype_name, self.encoding, self.row_bytes)

    @property
    def num_bytes(self) -> int:
        """Size of the whole tensor in bytes, after reading."""
        count = self.dtype.itemsize
        for size in self.shape:
            count *= size
        return count

    def count_step_rows(self, num_bytes: int) -> int:
        """Return how many rows to read at a time so that they take at most `num_bytes`, but at least one unit of rows."""
        rows = self.shape[0] if self.shape else 1
        return max(1, num_bytes * rows // max(1, self.num_bytes) // self.unit_rows) * self.unit_rows
