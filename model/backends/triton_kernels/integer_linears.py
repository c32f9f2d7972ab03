"""Integer linears on a device: weights packed once, and whole products with all that is done to their inputs."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from model.backends.int8 import InputSteps, count_slices
from model.backends.triton_kernels.int4_linear import multiply_int4, pack_halves
from model.backends.triton_kernels.int8_linear import MOST_COLUMNS, multiply_int8
from model.backends.triton_kernels.slices import BY_TENSOR, BY_TOKEN, SLICED, make_slices
from parallel.errors import ConfigError

_STEP_COLUMNS = 32
"""A group's columns are padded to a multiple of this, the least that a product of int8 tiles takes."""


@dataclass(frozen=True, slots=True)
class PackedLinear:
    """A weight on the device. Its groups have equal sizes, padded with columns of zeros."""

    weight: torch.Tensor
    """int8 [rows, groups * size], or uint8 [rows, groups * size / 2] where `zeros` is set (see int4_linear.py)."""
    zeros: torch.Tensor | None
    """int8 [rows, groups] of a packed 4-bit weight."""
    scale: torch.Tensor
    """float32 [rows, groups]."""
    index: torch.Tensor | None
    """int32 [groups * size]: the input of each column, -1 for padding; None: the inputs as they are, padded at the end."""
    columns: int
    """groups * size."""
    steps: InputSteps
    """What is done to the inputs."""


class IntegerLinears:
    """The integer linears of the Triton backend.

    A norm makes the slices of its result at once where an integer linear of that width exists: most of them follow a norm.
    """

    def __init__(self) -> None:
        self._widths: set[int] = set()
        self._sliced: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None

    def count_norm_slices(self, hidden: torch.Tensor) -> int:
        """Return the slices that a norm of `hidden` makes; 0: none."""
        return count_slices(hidden.dtype) if hidden.shape[1] in self._widths else 0

    def keep_slices(self, x: torch.Tensor, q: torch.Tensor, row_scale: torch.Tensor) -> None:
        """Keep the slices of x, which must not change, until the next norm."""
        self._sliced = x, q, row_scale

    def pack(self, weight: torch.Tensor, scale: torch.Tensor, sizes: Sequence[int], bits: int, steps: InputSteps) -> PackedLinear:
        """Pack weight int8 [rows, columns] with scale float32 [rows, groups] and the columns of each group; all on the device.

        Raises ConfigError for more columns than an int32 sum may have.
        """
        groups, size = len(sizes), -(-max(sizes) // _STEP_COLUMNS) * _STEP_COLUMNS
        packs = bits == 4 and groups > 1 and steps.correction is None
        if size >= MOST_COLUMNS:
            raise ConfigError(f"a linear with {size} inputs does not fit the integer kernels, which take fewer than {MOST_COLUMNS}")
        if packs and groups % 2:
            sizes, groups = [*sizes, 0], groups + 1
            scale = torch.cat((scale, scale.new_zeros((len(scale), 1))), dim=1)
        index = _index_columns(sizes, size, steps.order)
        padded = weight
        if index is not None or weight.shape[1] != groups * size:
            places = _index_columns(sizes, size, None)
            places = torch.arange(groups * size) if places is None else places
            places = torch.where(places < weight.shape[1], places, -1).to(weight.device)
            padded = weight[:, places.clamp(min=0)].masked_fill_(places < 0, 0)
        halves = pack_halves(padded.contiguous(), groups) if packs else None
        stored, zeros = (padded.contiguous(), None) if halves is None else halves
        if steps.activation is None and steps.divisor is None and index is None and weight.shape[1] == groups * size:
            self._widths.add(weight.shape[1])
        found = None if index is None else index.to(weight.device, torch.int32)
        return PackedLinear(stored, zeros, scale.contiguous(), found, groups * size, steps)

    def multiply(self, x: torch.Tensor, packed: PackedLinear, dtype: torch.dtype) -> torch.Tensor:
        """Multiply x [rows, columns] of any float dtype: [rows, weight rows] as `dtype`."""
        steps = packed.steps
        way = {None: SLICED, "token": BY_TOKEN, "tensor": BY_TENSOR}[steps.activation]
        slices = count_slices(x.dtype if steps.divisor is None else torch.float32) if way == SLICED else 1
        kept = self._sliced if self._sliced is not None and self._sliced[0] is x else None
        if kept is not None and way == SLICED and steps.divisor is None and packed.index is None and packed.columns == x.shape[1]:
            _, q, row_scale = kept
        else:
            q, row_scale = make_slices(
                x.contiguous(), packed.columns, way, slices, steps.divisor, packed.index, steps.input_scale, steps.zero_point
            )
        if packed.zeros is not None:
            return multiply_int4(q, row_scale, packed.weight, packed.zeros, packed.scale, dtype)
        return multiply_int8(q, row_scale, packed.weight, packed.scale, steps.correction, dtype)


def _index_columns(sizes: Sequence[int], size: int, order: torch.Tensor | None) -> torch.Tensor | None:
    """Return the input of each padded column, -1 for padding; None where the inputs only have to be padded at the end."""
    if order is None and all(one == size for one in sizes[:-1]):
        return None
    whole = torch.full((len(sizes), size), -1, dtype=torch.int64)
    ordered = torch.arange(sum(sizes)) if order is None else order.cpu().long()
    first = 0
    for group, count in enumerate(sizes):
        whole[group, :count] = ordered[first : first + count]
        first += count
    return whole.flatten()
