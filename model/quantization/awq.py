"""AWQ: search the scales of input channels that minimize the error of group-wise weight rounding.

arXiv 2306.00978: s = mean|x|^a / sqrt(max * min), a from 0 to 0.95; picks the a whose rounded weights Q(W * s) / s change the outputs
least. Handles the weights of one input on one rank; the caller adds up the ranks' errors.
"""

from collections.abc import Callable, Sequence

import torch

from model.backends.float_linear import float_linear
from model.layers.rounding import quantize_groups

_STEPS = 20


def search_scale(
    weights: Sequence[torch.Tensor],
    inputs: torch.Tensor,
    act_mean: torch.Tensor,
    bits: int,
    group_size: int,
    *,
    symmetric: bool,
    add_up: Callable[[int, torch.Tensor], float],
    share: Callable[[torch.Tensor], torch.Tensor] = lambda scale: scale,
) -> torch.Tensor:
    """Return float32 [columns]: multiplier of the weights and divisor of their inputs.

    weights: local rows [rows, columns] of every linear of this input; inputs: float32 samples [tokens, columns]; act_mean: mean
    magnitude of each channel. `add_up` sums squared errors of the local rows [rows] of one weight, identified by its index, over all
    ranks. `share` equalizes channels that a preceding layer can only scale together.
    """
    best, least = torch.ones_like(act_mean), float("inf")
    for step in range(_STEPS):
        scale = share(act_mean.clamp_min(1e-4).pow(step / _STEPS))
        scale = scale / (scale.max() * scale.min()).sqrt()
        error = 0.0
        for place, weight in enumerate(weights):
            scaled = (weight.float() * scale).to(weight.dtype)
            integers, scales, zero_points = quantize_groups(scaled, bits, group_size, symmetric=symmetric)
            change = dequantize(integers, scales, zero_points) / scale - weight.float()
            error += add_up(place, sum_columns(float_linear(inputs, change).square()))
        if error < least:
            best, least = scale, error
    return best


def sum_columns(values: torch.Tensor) -> torch.Tensor:
    """Sum the columns of float32 [tokens, columns], bitwise independent of the other columns, unlike `sum(dim=0)`."""
    return values.T.contiguous().sum(dim=1)


def dequantize(integers: torch.Tensor, scales: torch.Tensor, zero_points: torch.Tensor | None) -> torch.Tensor:
    """Return float32 [rows, columns] of integers [rows, columns] with scales and zero points [rows, groups]."""
    grouped = integers.reshape(*scales.shape, -1).float()
    if zero_points is not None:
        grouped = grouped - zero_points.unsqueeze(2)
    return grouped.mul(scales.float().unsqueeze(2)).flatten(1)
