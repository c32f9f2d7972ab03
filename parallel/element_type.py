"""The types of stored elements, by the names that PyTorch gives them."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING

from parallel.lazy_torch import torch


class ElementType(Enum):
    """Type of the elements of a stored tensor. Describes a tensor without PyTorch; `torch_dtype` is PyTorch's type of the same name."""

    FLOAT64 = "float64", 8
    FLOAT32 = "float32", 4
    FLOAT16 = "float16", 2
    BFLOAT16 = "bfloat16", 2
    FLOAT8_E4M3FN = "float8_e4m3fn", 1
    INT64 = "int64", 8
    INT32 = "int32", 4
    INT16 = "int16", 2
    INT8 = "int8", 1
    UINT64 = "uint64", 8
    UINT32 = "uint32", 4
    UINT16 = "uint16", 2
    UINT8 = "uint8", 1
    BOOL = "bool", 1

    def __init__(self, label: str, itemsize: int) -> None:
        self.label = label
        """PyTorch's name of the type, without `torch.`."""
        self.itemsize = itemsize
        """Bytes of an element."""

    if not TYPE_CHECKING:  # mypy reports such comparisons itself, but only where the class does not define its own

        def __eq__(self, other: object) -> bool:
            """Compare with another element type. Raises TypeError for anything else: a comparison with a torch.dtype is a mistake."""
            if not isinstance(other, ElementType):
                raise TypeError(f"{self} is compared with {other!r}, which is not an ElementType")
            return self is other

        def __hash__(self) -> int:
            return hash(self.label)

    @property
    def is_floating_point(self) -> bool:
        """Whether the type holds floats."""
        return "float" in self.label

    @property
    def torch_dtype(self) -> torch.dtype:
        """PyTorch's type. Imports PyTorch."""
        found: torch.dtype = getattr(torch, self.label)
        return found

    @classmethod
    def named(cls, label: str) -> ElementType:
        """Return the type that PyTorch calls `label`. Raises KeyError for an unknown one."""
        return _BY_LABEL[label]

    @classmethod
    def of(cls, dtype: torch.dtype) -> ElementType:
        """Return the type of PyTorch's `dtype`. Raises KeyError if no checkpoint format stores it."""
        return _BY_LABEL[str(dtype).removeprefix("torch.")]


_BY_LABEL = {kind.label: kind for kind in ElementType}
