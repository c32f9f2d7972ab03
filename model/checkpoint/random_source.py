"""A synthetic checkpoint for benchmarks: weights of any shape and scheme, generated as they are read.

Every tensor repeats one block of random elements, from an offset derived from its name. A row is therefore identical for every reader
and costs no more than a copy.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from model.checkpoint.source import Checksum
from model.spec.config import build_config
from model.spec.scheme import read_scheme
from model.spec.tensor_info import TensorInfo
from model.spec.weights import plan_weights
from parallel.element_type import ElementType
from parallel.file_slices import FileReader, StoredRows
from parallel.lazy_torch import torch

_BLOCK_ELEMENTS = 1_048_573
"""A prime, so that rows of common widths do not repeat."""
_STANDARD_DEVIATION = 0.02
"""Standard deviation of float weights: the usual initialization of this model family."""
_CONSTANTS: Mapping[str, float] = {
    "norm.weight": 1,
    "smooth_scale": 1,
    "weight_shape": 0,  # given in config.json, so not read
    "weight_zero_point": 0,
    "input_zero_point": 0,
    "input_scale": 0.05,
    "k_scale": 0.05,
    "v_scale": 0.05,
}
"""Constant tensors, by name suffix."""


class RandomSource:
    """The model described by the values of a config.json, with random weights."""

    files: Sequence[Path] = ()
    checksums: Mapping[Path, Checksum] = {}

    def __init__(self, values: Mapping[str, Any], path: Path) -> None:
        """`path`: origin of the values, for messages."""
        self.path, self.config = path, dict(values)
        config, self._scheme = build_config(values, str(path)), read_scheme(values)
        specs = plan_weights(config, self._scheme)
        self.tensors = {
            name: TensorInfo(spec.shape, ElementType.named(spec.dtypes[0] if len(spec.dtypes) == 1 else config.dtype))
            for name, spec in specs.items()
        }
        self._blocks: dict[torch.dtype, torch.Tensor] = {}

    def read_rows(self, reader: FileReader, name: str, start: int, stop: int) -> torch.Tensor:
        """Return rows [start, stop) of a tensor; `reader` is unused."""
        info, linear = self.tensors[name], self._scheme.find_linear(name.rpartition(".")[0])
        shape = (stop - start, *info.shape[1:])
        constant = next((value for end, value in _CONSTANTS.items() if name.endswith(end)), None)
        if name.endswith("weight_scale") and linear is not None:
            # Uniform integers get the standard deviation of float weights, which FP8 weights have themselves.
            constant = 1.0 if linear.float8 else _STANDARD_DEVIATION * 3.5 / (1 << linear.bits)
        if constant is not None:
            return torch.full(shape, constant, dtype=info.dtype.torch_dtype)
        if name.endswith("weight_g_idx") and linear is not None:
            return torch.arange(start, stop, dtype=info.dtype.torch_dtype) // (linear.group_size or info.shape[0])
        return self._copy(info, zlib.crc32(name.encode()), start, shape)

    def locate_rows(self, name: str, start: int, stop: int) -> list[StoredRows]:
        """Return nothing."""
        return []

    def tokenizer_path(self) -> Path | None:
        """Return None."""
        return None

    def _copy(self, info: TensorInfo, place: int, start: int, shape: tuple[int, ...]) -> torch.Tensor:
        block = self._block(info.dtype.torch_dtype)
        out = torch.empty(shape, dtype=info.dtype.torch_dtype)
        flat, done = out.view(-1), 0
        position = (place + start * (out.numel() // shape[0] if shape[0] else 0)) % _BLOCK_ELEMENTS
        while done < flat.numel():
            count = min(_BLOCK_ELEMENTS - position, flat.numel() - done)
            flat[done : done + count] = block[position : position + count]
            done, position = done + count, 0
        return out

    def _block(self, dtype: torch.dtype) -> torch.Tensor:
        if dtype not in self._blocks:
            generator = torch.Generator().manual_seed(0)
            if dtype.is_floating_point:
                block = torch.randn(_BLOCK_ELEMENTS, generator=generator).mul_(_STANDARD_DEVIATION).to(dtype)
            else:
                limits = torch.iinfo(dtype)
                block = torch.randint(limits.min, limits.max + 1, (_BLOCK_ELEMENTS,), generator=generator, dtype=torch.int64).to(dtype)
            self._blocks[dtype] = block
        return self._blocks[dtype]
