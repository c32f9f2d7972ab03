"""Random low-bit integers for the differential test, packed as each format packs them, with the weights that they stand for.

Written from the formats' documents; does not use the project's own packing.
"""

from dataclasses import dataclass

import torch

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight outputs stands at each place of a word of AutoAWQ, the lowest first."""


@dataclass(frozen=True, slots=True)
class Rounded:
    """A linear as integers of `bits` bits."""

    integers: torch.Tensor
    """int64 [outputs, inputs], from 0 to 2^bits - 1."""
    zeros: torch.Tensor
    """int64 [outputs, groups]."""
    scales: torch.Tensor
    """[outputs, groups], of the type that is stored."""
    index: torch.Tensor
    """int64 [inputs]: group of each input."""

    @property
    def weight(self) -> torch.Tensor:
        """float32 [outputs, inputs]."""
        return (self.integers - self.zeros[:, self.index]).float() * self.scales.float()[:, self.index]


def round_weight(
    weight: torch.Tensor, bits: int, group: int, *, symmetric: bool, scale_dtype: torch.dtype, index: torch.Tensor | None = None
) -> Rounded:
    """Round to nearest in groups of inputs; `group` -1: the whole row. `index`: groups that lie anywhere."""
    inputs = weight.shape[1]
    size, top = inputs if group == -1 else group, (1 << bits) - 1
    index = torch.arange(inputs) // size if index is None else index
    count = int(index.max()) + 1
    low, high = (torch.stack([find(weight[:, index == one], 1) for one in range(count)], 1) for find in (torch.amin, torch.amax))
    if symmetric:
        scales = (torch.maximum(-low, high) / (top // 2)).clamp_min(1e-4).to(scale_dtype)
        zeros = torch.full(scales.shape, (top + 1) // 2)
    else:
        scales = ((high - low) / top).clamp_min(1e-4).to(scale_dtype)
        zeros = (-low / scales.float()).round().clamp(0, top).long()
    integers = ((weight / scales.float()[:, index]).round().long() + zeros[:, index]).clamp(0, top)
    return Rounded(integers, zeros, scales, index)


def pack(values: torch.Tensor, bits: int, order: tuple[int, ...] | None = None) -> torch.Tensor:
    """Unsigned integers [a, b] as int32 words [a, b * bits / 32, rounded up], the first value lowest unless `order` is given."""
    per_word = 32 // bits
    values = torch.nn.functional.pad(values, (0, -values.shape[1] % per_word)).unflatten(1, (-1, per_word))
    if order is not None:
        values = values[..., list(order)]
    words = (values << (torch.arange(per_word) * bits)).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)
