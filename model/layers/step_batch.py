"""The input of a recorded decoding step, in one block of integers: what changes from step to step."""

from collections.abc import Sequence

import torch

from model.backends.paged import CHUNK_TOKENS, PagedRows
from model.layers.batch import Span, StoreRows
from model.layers.cache import KeyValueStore

_ALIGNED = 4
"""Integers of 16 bytes: where a part of the block may start."""


class StepBatch:
    """The rows of a recorded step, in place of a `Batch`: views of the block on the device."""

    lies_in_stores, is_paged = False, True
    spans: Sequence[Span] = ()
    """A recorded step has no sequences of its own."""
    adapted: Sequence[tuple[int, slice | torch.Tensor]] = ()
    """A recorded step has no adapters."""

    def __init__(self, block: torch.Tensor, rows: int, blocks: int, store: KeyValueStore, head_dim: int, rotaries: int) -> None:
        """`blocks`: of a sequence, at most. `rotaries`: 2 if layers with a window have angles of their own."""
        parts, angles = split_block(block, rows, blocks, head_dim, rotaries)
        self.tokens = parts[0]
        self._angles = [(one[0], one[1]) for one in angles]
        self._paged = PagedRows(
            parts[1].view(rows, 2), parts[2].view(rows, 4), parts[3].view(rows, blocks), -(-blocks * store.block_size // CHUNK_TOKENS), True
        )
        nothing = torch.empty(0, dtype=torch.int64)
        self._part = StoreRows(slice(0, rows), store, nothing, nothing)

    def angles(self, *, local: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cos and signed sin for a layer with a window (`local`), or without."""
        return self._angles[-1 if local else 0]

    def join_stores(self) -> list[StoreRows]:
        """Return all rows: they are in one store."""
        return [self._part]

    def place_part(self, part: StoreRows, tile_tokens: int) -> PagedRows:
        """Return the rows for the device's attention."""
        return self._paged


def count_integers(rows: int, blocks: int, head_dim: int, rotaries: int) -> int:
    """Return the size of the block of a step."""
    return sum(-(-size // _ALIGNED) * _ALIGNED for size in _list_sizes(rows, blocks, head_dim, rotaries))


def split_block(
    block: torch.Tensor, rows: int, blocks: int, head_dim: int, rotaries: int
) -> tuple[list[torch.Tensor], list[tuple[torch.Tensor, torch.Tensor]]]:
    """Return the parts of a block int32 [integers]: tokens, rows, tiles and table as in `PagedRows`; cos and sin of each rotary."""
    parts, first = [], 0
    for size in _list_sizes(rows, blocks, head_dim, rotaries):
        parts.append(block[first : first + size])
        first += -(-size // _ALIGNED) * _ALIGNED
    floats = [part.view(torch.float32).view(rows, 1, head_dim) for part in parts[4:]]
    return parts[:4], list(zip(floats[::2], floats[1::2], strict=True))


def _list_sizes(rows: int, blocks: int, head_dim: int, rotaries: int) -> list[int]:
    return [rows, 2 * rows, 4 * rows, rows * blocks, *[rows * head_dim] * (2 * rotaries)]
