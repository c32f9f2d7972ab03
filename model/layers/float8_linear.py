"""FP8 linears split over output rows: weights stay float8_e4m3fn in memory, with a float32 scale per row and group of columns.

Each weight is dequantized as it is used, in float32, and rounded once to the compute dtype: bitwise the same as a linear whose weights
were dequantized while loading.
"""

from collections.abc import Sequence

import torch
from torch import nn

from model.backends.interface import Backend
from model.backends.upload import upload
from model.layers.linear import RowBlock, check_rows, tile_rows
from model.spec.linear_scheme import LinearScheme
from parallel.layout import TILE_ROWS

_PIECE_WEIGHTS = 1 << 18
"""Weights dequantized at a time: their copies stay in a core's cache."""
_MULTIPLIED_WEIGHTS = 1 << 22
"""Weights multiplied at a time."""
_BIAS_FACTOR = 256.0
"""2^8: the exponent bias of float16 is 15, that of e4m3fn is 7."""
_SIGN_AND_NUMBER = -16385
"""All bits of an int16 except the one next to the sign, into which the shift repeats it."""


class Float8ColumnParallelLinear(nn.Module):
    """The rows of one or several fused weights that this rank owns. Built on the meta device; `assign` sets its weight."""

    def __init__(self, in_features: int, blocks: Sequence[RowBlock], scheme: LinearScheme, dtype: torch.dtype, backend: Backend) -> None:
        super().__init__()
        self.in_features, self.blocks, self.scheme = in_features, tuple(blocks), scheme
        total, self._index = tile_rows(blocks)
        self._dtype, self._backend, self._has_nan = dtype, backend, False
        groups = scheme.num_groups(in_features)
        self.weight = nn.Parameter(torch.empty((total, in_features), dtype=torch.float8_e4m3fn, device="meta"), requires_grad=False)
        self.scale = nn.Parameter(torch.empty((total, groups), dtype=torch.float32, device="meta"), requires_grad=False)

    def assign(self, weight: torch.Tensor, scale: torch.Tensor, device: torch.device) -> None:
        """Set the local rows of all blocks: float8 [rows, in_features], and float32 scales [rows, groups]."""
        check_rows(weight, self.blocks, self.in_features)
        if self._index is not None:
            self._index = self._index.to(device)
            tiled, scales = torch.zeros(self.weight.shape, dtype=torch.uint8), torch.zeros(self.scale.shape)
            tiled[self._index.cpu()], scales[self._index.cpu()] = weight.view(torch.uint8), scale
            weight, scale = tiled.view(torch.float8_e4m3fn), scales
        self._has_nan = any(bool(piece.isnan().any()) for piece in torch.split(weight, self._count_rows(_PIECE_WEIGHTS)))
        self.weight = nn.Parameter(upload(weight, device), requires_grad=False)
        self.scale = nn.Parameter(scale.to(device), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[rows, in_features] to [rows, local rows of all blocks]."""
        step = self._count_rows(_MULTIPLIED_WEIGHTS)
        parts = [
            self._backend.float_linear(x, self.dequantize(first, min(first + step, self.weight.shape[0])))
            for first in range(0, self.weight.shape[0], step)
        ]
        out = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        return out if self._index is None else out[:, self._index]

    def dequantize(self, start: int, stop: int) -> torch.Tensor:
        """Return tiled rows [start, stop) in the compute dtype."""
        out = torch.empty((stop - start, self.in_features), dtype=self._dtype, device=self.weight.device)
        step, group = self._count_rows(_PIECE_WEIGHTS), self.scheme.group_size or self.in_features
        for first in range(start, stop, step):
            last = min(first + step, stop)
            rows, scale = self._widen(self.weight[first:last]), self.scale[first:last]
            if scale.shape[1] > 1:
                scale = scale.repeat_interleave(group, dim=1)[:, : self.in_features]
            out[first - start : last - start] = rows.mul_(scale)
        return out

    def _widen(self, weight: torch.Tensor) -> torch.Tensor:
        """Convert exactly to float32. PyTorch's own conversion takes three times as long on a CPU (measured)."""
        if self._has_nan or not self._backend.in_host_memory:
            return weight.float()
        halves = weight.view(torch.int8).to(torch.int16)
        halves.bitwise_left_shift_(8).bitwise_right_shift_(1).bitwise_and_(_SIGN_AND_NUMBER)
        return halves.view(torch.float16).float().mul_(_BIAS_FACTOR)

    def _count_rows(self, weights: int) -> int:
        return max(1, weights // self.in_features // TILE_ROWS) * TILE_ROWS
