"""The values of small tensors as NumPy arrays, read without PyTorch where a format stores them as they are."""

from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.checkpoint.source import CheckpointSource
from parallel.element_type import ElementType
from parallel.file_slices import FileReader
from parallel.lazy_torch import torch


def read_values(source: CheckpointSource, reader: FileReader, name: str, start: int = 0, stop: int | None = None) -> NDArray[Any]:
    """Return rows [start, stop) of a tensor, to its end by default: floats as float32 or float64, everything else in its own type.

    Raises CheckpointError when a file is truncated.
    """
    info = source.tensors[name]
    stop = (info.shape[0] if info.shape else 1) if stop is None else stop
    return decode_values(read_stored(source, reader, name, start, stop), info.dtype).reshape(stop - start, *info.shape[1:])


def read_stored(source: CheckpointSource, reader: FileReader, name: str, start: int, stop: int) -> NDArray[np.uint8]:
    """Return rows [start, stop) of a tensor as bytes [rows, bytes of a row]. Raises CheckpointError when a file is truncated."""
    if parts := source.locate_rows(name, start, stop):
        return reader.read_stored(parts, start, stop)
    info = source.tensors[name]
    rows = source.read_rows(reader, name, start, stop).contiguous().reshape(-1).view(torch.uint8)
    return np.asarray(rows.numpy()).reshape(stop - start, prod(info.shape[1:]) * info.dtype.itemsize)


def decode_values(stored: NDArray[np.uint8], dtype: ElementType) -> NDArray[Any]:
    """Decode little-endian bytes [..., bytes of a row] to values [..., elements]; floats of less than 32 bits become float32."""
    if dtype == ElementType.BFLOAT16:  # the upper half of a float32
        wide: NDArray[np.uint32] = stored.view("<u2").astype(np.uint32) << np.uint32(16)
        return wide.view(np.float32)
    if dtype == ElementType.FLOAT8_E4M3FN:
        return np.asarray(_FLOAT8[stored])
    found: NDArray[Any] = stored.view(np.dtype(dtype.label).newbyteorder("<"))
    return found.astype(np.float32) if dtype == ElementType.FLOAT16 else found


def _list_float8() -> NDArray[np.float32]:
    """Return the float8_e4m3fn of each byte: a sign, 4 bits of exponent biased by 7, 3 of mantissa; no infinity, and one NaN per sign."""
    codes = np.arange(256, dtype=np.int32)
    exponent, mantissa = codes >> 3 & 15, codes & 7
    values = np.ldexp(np.where(exponent > 0, 8 + mantissa, mantissa).astype(np.float32), np.maximum(exponent, 1) - 10)
    values[(codes & 127) == 127] = np.nan
    return np.asarray(np.where(codes > 127, -values, values), dtype=np.float32)


_FLOAT8 = _list_float8()
