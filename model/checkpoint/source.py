"""What every checkpoint format gives: names, shapes and rows of tensors, under Hugging Face names.

Knows no format; `model/checkpoint/formats.py` holds the table of formats.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from parallel.file_slices import FileReader


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Shape and type of one tensor as `read_rows` gives it."""

    shape: tuple[int, ...]
    """Full shape, rows first."""
    dtype: torch.dtype
    """Type of the elements."""

    @property
    def num_bytes(self) -> int:
        """Size of the whole tensor, bytes."""
        count = self.dtype.itemsize
        for size in self.shape:
            count *= size
        return count


class CheckpointSource(Protocol):
    """An opened checkpoint: headers are read, tensors are not."""

    @property
    def path(self) -> Path:
        """The file or folder."""
        ...

    @property
    def config(self) -> dict[str, Any]:
        """Values of config.json, or what the format's own metadata gives in its place."""
        ...

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor, by its Hugging Face name."""
        ...

    def read_rows(self, reader: FileReader, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of a tensor."""
        ...

    def tokenizer_path(self) -> Path | None:
        """The folder or file that holds the tokenizer, if any."""
        ...


@dataclass(slots=True)
class TensorReport:
    """How the tensors of a checkpoint differ from those that a model needs."""

    missing: list[str] = field(default_factory=list)
    """Needed and absent."""
    unexpected: list[str] = field(default_factory=list)
    """Present and unknown."""
    mismatched: list[str] = field(default_factory=list)
    """Present with another shape or type, in words."""

    def describe(self) -> str:
        """One line a kind, ten names each; empty when nothing differs."""
        parts = []
        for kind in ("missing", "unexpected", "mismatched"):
            names = getattr(self, kind)
            if names:
                more = f", and {len(names) - 10} more" if len(names) > 10 else ""
                parts.append(f"{len(names)} {kind}: {', '.join(names[:10])}{more}")
        return "; ".join(parts)
