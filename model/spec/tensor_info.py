"""Shape and dtype of a stored tensor."""

from dataclasses import dataclass

import torch

from model.spec.stored_form import StoredForm


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Shape and dtype of one tensor as `read_rows` returns it, and how it is stored where that differs."""

    shape: tuple[int, ...]
    """Full shape, rows first."""
    dtype: torch.dtype
    """Element type."""
    encoding: str | None = None
    """See StoredForm."""
    row_bytes: int | None = None
    """See StoredForm."""
    unit_rows: int = 1
    """Rows that are stored in another order, and therefore always read together."""

    @property
    def dtype_name(self) -> str:
        """Name of the dtype, without `torch.`."""
        return str(self.dtype).removeprefix("torch.")

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
