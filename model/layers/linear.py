"""Linear layers split over output rows, and the embedding split over its vocabulary.

Every matmul covers the whole inner dimension on one rank, in a shape that makes it bitwise identical whichever rank owns the rows:
weight rows and activation rows are padded to whole tiles of 16, and the padding is cut off again.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from model.backends.interface import Backend
from model.backends.upload import upload
from parallel.layout import TILE_ROWS


@dataclass(frozen=True, slots=True)
class RowBlock:
    """Local rows of one weight inside a fused layer."""

    num_rows: int
    """Number of rows on this rank."""
    unit: int
    """Rows per unit; padded to a multiple of the tile size."""


def tile_rows(blocks: Sequence[RowBlock]) -> tuple[int, torch.Tensor | None]:
    """Return the number of rows of the tiled weight, and the indices of the real rows in it (None: there is no padding)."""
    places, total = [], 0
    for block in blocks:
        for first in range(0, block.num_rows, block.unit):
            rows = min(block.unit, block.num_rows - first)
            places.append(torch.arange(total, total + rows))
            total += -(-rows // TILE_ROWS) * TILE_ROWS
    index = torch.cat(places)
    return total, None if len(index) == total else index


def check_rows(weight: torch.Tensor, blocks: Sequence[RowBlock], in_features: int) -> None:
    """Assert that `weight` has the rows of all blocks."""
    assert weight.shape == (sum(block.num_rows for block in blocks), in_features), (weight.shape, blocks)


class ColumnParallelLinear(nn.Module):
    """The rows of one or several fused weights that this rank owns. Built on the meta device; `assign` sets its weight."""

    def __init__(self, in_features: int, blocks: Sequence[RowBlock], dtype: torch.dtype, backend: Backend) -> None:
        super().__init__()
        self.in_features, self.blocks = in_features, tuple(blocks)
        total, self._index = tile_rows(blocks)
        self._backend = backend
        self.weight = nn.Parameter(torch.empty((total, in_features), dtype=dtype, device="meta"), requires_grad=False)

    @property
    def is_plain(self) -> bool:
        """Whether its output needs no indexing: the weight has no padding rows."""
        return self._index is None

    def assign(self, weight: torch.Tensor, device: torch.device) -> None:
        """Set the local rows [rows of all blocks, in_features]."""
        check_rows(weight, self.blocks, self.in_features)
        whole = weight.to(self.weight.dtype)
        if self._index is not None:
            self._index = self._index.to(device)
            tiled = whole.new_zeros(self.weight.shape)
            tiled[self._index.cpu()] = whole
            whole = tiled
        self.weight = nn.Parameter(upload(whole, device), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[rows, in_features] to [rows, local rows of all blocks]."""
        out = self._backend.float_linear(x, self.weight)
        return out if self._index is None else out[:, self._index]


class BiasedLinear(nn.Module):
    """A fused linear with a bias added to its output. Empty until both are assigned."""

    def __init__(self, linear: nn.Module, rows: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.linear = linear
        self.bias = nn.Parameter(torch.empty(rows, dtype=dtype, device="meta"), requires_grad=False)

    def assign_bias(self, bias: torch.Tensor, device: torch.device) -> None:
        """Set the bias [rows]."""
        assert bias.shape == self.bias.shape, (bias.shape, self.bias.shape)
        self.bias = nn.Parameter(bias.to(device, self.bias.dtype), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[T, in_features] to [T, rows]."""
        product: torch.Tensor = self.linear(x)
        return product + self.bias


class VocabParallelEmbedding(nn.Module):
    """The vocabulary rows of this rank; the same tiled rows serve as a tied output head."""

    def __init__(self, hidden_size: int, first_id: int, block: RowBlock, dtype: torch.dtype, backend: Backend) -> None:
        super().__init__()
        self.first_id, self.num_ids = first_id, block.num_rows
        self.rows = ColumnParallelLinear(hidden_size, (block,), dtype, backend)

    def assign(self, weight: torch.Tensor, device: torch.device) -> None:
        """Set the local rows [ids, hidden]."""
        self.rows.assign(weight, device)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return rows [ids, hidden] of the ids owned by this rank; rows of other ids are arbitrary."""
        local = (ids - self.first_id).clamp_(0, self.num_ids - 1)
        if self.rows._index is not None:
            local = self.rows._index[local]
        return F.embedding(local, self.rows.weight)
