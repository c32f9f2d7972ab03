"""The element types of GGUF: blocks of integers with scales, dequantized by the gguf library as rows are read, or plain floats."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from model.checkpoint.gguf_header import StoredTensor
from model.spec.tensor_info import TensorInfo
from parallel.element_type import ElementType
from parallel.errors import CheckpointError
from parallel.file_slices import FileReader
from parallel.lazy_torch import torch

_PIECE_BYTES = 1 << 20
"""Bytes dequantized at a time: the library holds several copies."""


@dataclass(frozen=True, slots=True)
class Encoding:
    """Storage of one type: blocks of `block_elements` in `block_bytes`."""

    name: str
    block_elements: int
    block_bytes: int
    dtype: ElementType = ElementType.FLOAT32
    """Element type after reading."""

    @property
    def is_quantized(self) -> bool:
        """Whether blocks have to be dequantized."""
        return self.block_elements > 1

    def count_row_bytes(self, stored: StoredTensor) -> int:
        """Return the stored size of a row, or of a vector's element."""
        return math.prod(stored.shape[1:]) // self.block_elements * self.block_bytes

    def count_bytes(self, stored: StoredTensor) -> int:
        """Return the stored size of a tensor."""
        return math.prod(stored.shape) // self.block_elements * self.block_bytes


ENCODINGS = {
    0: Encoding("F32", 1, 4),
    1: Encoding("F16", 1, 2, ElementType.FLOAT16),
    30: Encoding("BF16", 1, 2, ElementType.BFLOAT16),
    8: Encoding("Q8_0", 32, 34),
    2: Encoding("Q4_0", 32, 18),
    3: Encoding("Q4_1", 32, 20),
    6: Encoding("Q5_0", 32, 22),
    7: Encoding("Q5_1", 32, 24),
    10: Encoding("Q2_K", 256, 84),
    11: Encoding("Q3_K", 256, 110),
    12: Encoding("Q4_K", 256, 144),
    13: Encoding("Q5_K", 256, 176),
    14: Encoding("Q6_K", 256, 210),
    20: Encoding("IQ4_NL", 32, 18),
    23: Encoding("IQ4_XS", 256, 136),
    16: Encoding("IQ2_XXS", 256, 66),
    17: Encoding("IQ2_XS", 256, 74),
    22: Encoding("IQ2_S", 256, 82),
    18: Encoding("IQ3_XXS", 256, 98),
    21: Encoding("IQ3_S", 256, 110),
}
"""By ggml_type number."""


def cut_experts(stored: StoredTensor) -> list[StoredTensor]:
    """Return the matrices of a tensor [experts, rows, columns]."""
    experts, rows, columns = stored.shape
    size = ENCODINGS[stored.type_number].count_bytes(stored) // experts
    return [StoredTensor((rows, columns), stored.type_number, stored.offset_bytes + number * size) for number in range(experts)]


def check_encoding(stored: StoredTensor, name: str, path: Path) -> Encoding:
    """Return the encoding of a tensor. Raises CheckpointError if it is not supported, or does not suit the shape."""
    encoding = ENCODINGS.get(stored.type_number)
    if encoding is None:
        known = ", ".join(one.name for one in ENCODINGS.values())
        raise CheckpointError(
            f"{path}: {name} has type {_name_type(stored.type_number)}, but only {known} are supported: take such a file, or convert this "
            "one with `llama-quantize --allow-requantize FILE OUT Q8_0`"
        )
    if encoding.is_quantized and len(stored.shape) < 2:
        raise CheckpointError(f"{path}: {name} is a vector of type {encoding.name}, but vectors are floats: convert it again")
    if stored.shape[-1] % encoding.block_elements:
        raise CheckpointError(
            f"{name}: rows of {stored.shape[-1]} elements do not divide into {encoding.name} blocks of {encoding.block_elements}"
        )
    return encoding


def describe_tensor(stored: StoredTensor, unit_rows: int = 1) -> TensorInfo:
    """Return what `read_stored_rows` reads."""
    encoding = ENCODINGS[stored.type_number]
    if not encoding.is_quantized:
        return TensorInfo(stored.shape, encoding.dtype, unit_rows=unit_rows)
    return TensorInfo(stored.shape, encoding.dtype, encoding.name, encoding.count_row_bytes(stored), unit_rows)


def read_stored_rows(reader: FileReader, path: Path, stored: StoredTensor, start: int, stop: int) -> torch.Tensor:
    """Return rows [start, stop) in stored order, dequantized as by the gguf library."""
    encoding = ENCODINGS[stored.type_number]
    row_bytes, shape = encoding.count_row_bytes(stored), (stop - start, *stored.shape[1:])
    if not encoding.is_quantized:
        data = reader.read_span(path, stored.offset_bytes + start * row_bytes, (stop - start) * row_bytes)
        return data.view(encoding.dtype.torch_dtype).view(shape)
    # Importing gguf takes 0.2 s, which ranks that read other formats should not pay.
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    kind, out = GGMLQuantizationType(stored.type_number), torch.empty(shape)
    step = max(1, _PIECE_BYTES * len(out) // max(1, out.nbytes))
    for first in range(start, stop, step):
        count = min(step, stop - first)
        data = reader.read_span(path, stored.offset_bytes + first * row_bytes, count * row_bytes)
        # A NaN scale yields NaN elements, as in any other format.
        with np.errstate(all="ignore"):
            rows = dequantize(data.numpy().reshape(count, row_bytes), kind)
        out[first - start : first - start + count] = torch.from_numpy(rows).view(count, *shape[1:])
    return out


def _name_type(number: int) -> str:
    from gguf.constants import GGMLQuantizationType

    return GGMLQuantizationType(number).name if number in set(GGMLQuantizationType) else f"number {number}"
