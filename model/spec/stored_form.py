"""How a tensor lies in its file, as far as planning needs to know. Does not depend on PyTorch."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StoredForm:
    """The stored form of one tensor."""

    dtype: str
    """Element type after reading, by its PyTorch name."""
    encoding: str | None = None
    """Name of the block encoding in the file, such as Q4_K; None: stored in `dtype`."""
    row_bytes: int | None = None
    """Bytes of one row in the file; None: those of its elements in `dtype`."""
