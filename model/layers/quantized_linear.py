"""Quantized linears split over output rows: weight-only (A16W8, grouped A16W4), or with quantized activations (A8W8, A8W4).

Integer matmuls are exact and sums over groups have a fixed order, so results are bitwise identical for any ranks and kernels.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from model.backends.int8 import InputSteps, Int8Kernel, Part, count_slices, one_slice_linear, sliced_linear, token_linear
from model.backends.interface import Backend
from model.backends.upload import upload
from model.kernels.library import KernelInputs, PackedInt4
from model.layers.float8_linear import Float8ColumnParallelLinear
from model.layers.linear import ColumnParallelLinear, RowBlock, check_rows
from model.spec.linear_memory import count_linear_bytes
from model.spec.linear_scheme import LinearScheme, run_as_one


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredLinear:
    """The local rows of one linear, or of several fused ones, as stored in a checkpoint."""

    weight: torch.Tensor
    """int8 [rows, columns], zero points subtracted."""
    scale: torch.Tensor
    """float32 [rows, groups]."""
    group_index: torch.Tensor | None = None
    """int [columns]: the group of each column; None: contiguous groups."""
    input_scale: float = 1.0
    """For static activation quantization."""
    input_zero_point: int = 0
    """For static activation quantization."""
    smooth_scale: torch.Tensor | None = None
    """float32 [columns]: divisor of the inputs."""


class QuantizedColumnParallelLinear(nn.Module):
    """The rows of one or several fused weights that this rank owns. Empty until `assign`."""

    def __init__(self, in_features: int, blocks: Sequence[RowBlock], scheme: LinearScheme, kernel: Int8Kernel) -> None:
        super().__init__()
        self.in_features, self.blocks, self.scheme, self.kernel = in_features, tuple(blocks), scheme, kernel
        rows = sum(block.num_rows for block in blocks)
        self.weight_bytes = count_linear_bytes(
            rows, in_features, scheme, own_kernels=kernel.whole is not None or kernel.linears is not None
        )
        """Integers, scales and zero points in memory."""
        self._parts: list[Part] = []
        self._packed: PackedInt4 | None = None
        self._whole: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
        self._device_packed: Any = None
        self._order: torch.Tensor | None = None
        self._divisor: torch.Tensor | None = None
        self._input_scale, self._zero_point = 1.0, 0
        self._correction: torch.Tensor | None = None

    @property
    def is_whole(self) -> bool:
        """Whether it is a single matmul of the whole weight, with all that is done to its inputs."""
        return self._whole is not None or self._packed is not None

    def find_whole(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | PackedInt4:
        """Return the weight, scales and first column of each group, or the packed 4-bit weight, if it is kept whole."""
        whole = self._whole or self._packed
        assert whole is not None
        return whole

    def describe_inputs(self, dtype: torch.dtype) -> KernelInputs:
        """Return what the kernel does to inputs of this dtype. Its pointers are valid as long as this layer."""
        num_slices = count_slices(dtype if self._divisor is None else torch.float32)
        static = self.scheme.activation == "tensor"
        return KernelInputs(
            num_slices if self.scheme.activation is None else 1,
            None if self._divisor is None else self._divisor.data_ptr(),
            None if self._order is None else self._order.data_ptr(),
            self._input_scale if static else 0.0,
            self._zero_point if static else 0,
            None if self._correction is None else self._correction.data_ptr(),
        )

    def assign(self, stored: StoredLinear, device: torch.device) -> None:
        """Set the rows of all blocks, concatenated, and pack them if the kernel needs it."""
        weight, scale = stored.weight, stored.scale.float()
        check_rows(weight, self.blocks, self.in_features)
        sizes = _group_sizes(self.in_features, scale.shape[1], self.scheme.group_size, stored.group_index)
        if stored.group_index is not None:
            order = torch.argsort(stored.group_index, stable=True)
            weight, self._order = weight[:, order], order.to(device)
        if self.kernel.whole is not None:
            starts = torch.tensor([0, *itertools.accumulate(sizes)])
            self._packed = self.kernel.whole.pack_int4(weight, scale, starts) if self.scheme.bits == 4 else None
            self._whole = (weight.contiguous(), scale.contiguous(), starts) if self._packed is None else None
        elif self.kernel.linears is None:
            self._parts = self._pack_parts(weight, scale, sizes, device)
        if stored.smooth_scale is not None:
            assert self._order is None, "the kernels divide the ordered inputs"
            self._divisor = stored.smooth_scale.float().contiguous().to(device)
        self._input_scale, self._zero_point = stored.input_scale, stored.input_zero_point
        if stored.input_zero_point:
            sums = weight.sum(dim=1, dtype=torch.int64).double()
            self._correction = (sums * stored.input_zero_point * scale[:, 0].double()).float().to(device)
        if self.kernel.linears is not None:
            steps = InputSteps(self.scheme.activation, self._divisor, self._order, self._input_scale, self._zero_point, self._correction)
            packed = self.kernel.linears.pack(weight.to(device), scale.to(device), sizes, self.scheme.bits, steps)
            self._device_packed = packed

    def _pack_parts(self, weight: torch.Tensor, scale: torch.Tensor, sizes: list[int], device: torch.device) -> list[Part]:
        parts, column = [], 0
        for group, size in enumerate(sizes):
            columns = weight if len(sizes) == 1 else weight[:, column : column + size].contiguous()
            packed = self.kernel.pack(upload(columns, device), scale[:, group].contiguous().to(device))
            parts.append(Part(column, column + size, packed))
            column += size
        return parts

    def _multiply_whole(self, x: torch.Tensor) -> torch.Tensor:
        assert self.kernel.whole is not None
        inputs = self.describe_inputs(x.dtype)
        if self._packed is not None:
            return self.kernel.whole.int4_linear(x, self._packed, inputs, x.dtype)
        assert self._whole is not None
        return self.kernel.whole.int8_linear(x, *self._whole, inputs, x.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [rows, in_features] to [rows, local rows of all blocks], in the dtype of x."""
        if self.kernel.whole is not None:
            return self._multiply_whole(x)
        if self.kernel.linears is not None:
            return self.kernel.linears.multiply(x, self._device_packed, x.dtype)
        dtype, divisor = x.dtype, self._divisor
        if self.scheme.activation == "tensor":
            scale: Any = self._input_scale if divisor is None else divisor * self._input_scale
            integers = (x.float() / scale).add_(self._zero_point).round_().clamp_(-128, 127)
            product = one_slice_linear(integers, self._parts, self.kernel)
            if self._correction is not None:
                product.sub_(self._correction)
            product.mul_(self._input_scale)
            # No integer represents NaN: without this, a NaN row would turn into finite values.
            return product.masked_fill_(x.amax(dim=1, keepdim=True).isnan(), torch.nan).to(dtype)
        if divisor is not None:
            x = x.float() / divisor
        if self.scheme.activation == "token":
            return token_linear(x, self._parts, self.kernel, self._order).to(dtype)
        return sliced_linear(x, self._parts, self.kernel, self._order).to(dtype)


class SeparateLinears(nn.Module):
    """Linears with the same input that cannot run as one matmul; their outputs are concatenated."""

    def __init__(self, linears: Sequence[nn.Module]) -> None:
        super().__init__()
        self.linears = nn.ModuleList(linears)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [rows, in_features] to [rows, local rows of all linears]."""
        return torch.cat([linear(x) for linear in self.linears], dim=1)


def build_linear(
    in_features: int, blocks: Sequence[RowBlock], schemes: Sequence[LinearScheme | None], dtype: torch.dtype, backend: Backend
) -> nn.Module:
    """Build the layer for linears with the same input, given one block and one scheme each: one matmul if `run_as_one`."""
    if not run_as_one(schemes):
        alone = [build_linear(in_features, (block,), (one,), dtype, backend) for block, one in zip(blocks, schemes, strict=True)]
        return SeparateLinears(alone)
    scheme = schemes[0]
    if scheme is None:
        return ColumnParallelLinear(in_features, blocks, dtype, backend)
    if scheme.float8:
        return Float8ColumnParallelLinear(in_features, blocks, scheme, dtype, backend)
    return QuantizedColumnParallelLinear(in_features, blocks, scheme, backend.int8_kernel)


def _group_sizes(columns: int, groups: int, group_size: int | None, index: torch.Tensor | None) -> list[int]:
    if index is not None:
        return torch.bincount(index.long(), minlength=groups).tolist()
    if group_size is None:
        return [columns]
    return [min(group_size, columns - first) for first in range(0, columns, group_size)]
