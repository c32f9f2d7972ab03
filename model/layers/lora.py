"""The update of one fused linear by one LoRA adapter, added to the rows of the sequences that use it.

lora_A runs whole on every rank, and lora_B is split like the rows of the linear: every sum is computed by one rank in a fixed order. Both
are float32, so the update of a bfloat16 model is rounded once, when it is added.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from model.backends.interface import Backend
from model.layers.linear import ColumnParallelLinear, RowBlock
from parallel.layout import TILE_ROWS


@dataclass(frozen=True, slots=True)
class UpdatePart:
    """The update of one linear in a fused one."""

    first_row: int
    """Of its rows on this rank, in the output of the fused linear."""
    block: RowBlock
    """Those rows."""
    first_rank: int
    """Of its columns, in the joined outputs of lora_A."""
    weight: torch.Tensor
    """lora_B with its scale: float32 [rows, rank]."""


class LoraLayer:
    """The updates that belong to one fused linear."""

    def __init__(self, a: torch.Tensor, parts: Sequence[UpdatePart], backend: Backend, device: torch.device) -> None:
        """`a`: lora_A of all parts, joined: float32 [ranks, columns]."""
        self._down = ColumnParallelLinear(a.shape[1], (RowBlock(a.shape[0], TILE_ROWS),), torch.float32, backend)
        self._down.assign(a, device)
        self._ups: list[tuple[slice, slice, ColumnParallelLinear]] = []
        for part in parts:
            rows, rank = part.weight.shape
            up = ColumnParallelLinear(rank, (part.block,), torch.float32, backend)
            up.assign(part.weight, device)
            self._ups.append((slice(part.first_row, part.first_row + rows), slice(part.first_rank, part.first_rank + rank), up))

    @property
    def num_bytes(self) -> int:
        """Bytes in memory on this rank."""
        return sum(linear.weight.nbytes for linear in (self._down, *(up for _, _, up in self._ups)))

    def add(self, x: torch.Tensor, out: torch.Tensor, rows: torch.Tensor | slice) -> None:
        """Add the update of `rows` of the inputs x [T, columns] to those rows of `out` [T, local rows of the fused linear], in place."""
        low = self._down(x[rows].float())
        for place, columns, up in self._ups:
            update = up(low[:, columns].contiguous())
            if isinstance(rows, slice):
                out[rows, place] += update
            else:
                out[rows, place] = (out[rows, place] + update).to(out.dtype)
