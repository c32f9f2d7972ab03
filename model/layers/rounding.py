"""Rounding to integers with a scale, per row (bitwise identical to Golden Stick) and per group of columns.

    symmetric   scale = 2 * absmax / (2^bits - 1), zero point 0
    otherwise   scale = (max - min) / (2^bits - 1), zero point = round(-2^(bits-1) - min / scale)
    integer     clip(round(x / scale + zero point)), halves to even

Scales are computed in float32 and then cast to the dtype of the input; division and rounding use that dtype (mindspore-ai/golden-stick
v0.6.0, quantization/quant_utils.py).
"""

import torch


def quantize_rows(weight: torch.Tensor, bits: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize weight [rows, columns] to int8 [rows, columns] and scale [rows, 1] in the weight's dtype.

    An all-zero row gets scale 1 and zeros (the original writes scale 0, which divides by zero).
    """
    largest = weight.abs().amax(dim=1, keepdim=True).float()
    scale = symmetric_scale(largest, bits).to(weight.dtype)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return round_to_integers(weight / scale, bits), scale


def quantize_groups(
    weight: torch.Tensor, bits: int, group_size: int, *, symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Quantize weight [rows, columns] to int8 [rows, columns], scale [rows, groups], and int8 zero points [rows, groups] or None.

    `group_size` divides the columns.
    """
    grouped = weight.reshape(weight.shape[0], -1, group_size)
    scale, zero_point = choose_group_scales(grouped, bits, symmetric=symmetric)
    scaled = grouped / scale.unsqueeze(2)
    if zero_point is not None:
        scaled = scaled + zero_point.unsqueeze(2)
    return round_to_integers(scaled, bits).flatten(1), scale, zero_point


def choose_group_scales(grouped: torch.Tensor, bits: int, *, symmetric: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return scales [...] in the dtype of `grouped` [..., group], and int8 zero points [...] if asymmetric.

    Asymmetric ranges are widened to include 0, as in compressed-tensors, so that the zero point is an integer of the same width.
    """
    if symmetric:
        scale, zero_point = symmetric_scale(grouped.abs().amax(dim=-1).float(), bits).to(grouped.dtype), None
    else:
        low, high = grouped.amin(dim=-1).float().clamp_max(0), grouped.amax(dim=-1).float().clamp_min(0)
        scale = ((high - low) / (2**bits - 1)).to(grouped.dtype)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    if not symmetric:
        zero_point = round_to_integers(-(2 ** (bits - 1)) - low / scale.float(), bits)
    return scale, zero_point


def symmetric_scale(largest: torch.Tensor, bits: int = 8) -> torch.Tensor:
    """Return 2 * absmax / (2^bits - 1), float32."""
    return largest.mul(2).div(2**bits - 1)


def asymmetric_scale(low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the float32 scale and int8 zero point of 8-bit integers over [low, high]; scale 1 and zero point 0 if the two are equal."""
    scale = (high.float() - low.float()) / 255
    empty = scale == 0
    scale = torch.where(empty, torch.ones_like(scale), scale)
    zero_point = round_to_integers(-128 - low.float() / scale, 8)
    return scale, torch.where(empty, torch.zeros_like(zero_point), zero_point)


def round_to_integers(scaled: torch.Tensor, bits: int) -> torch.Tensor:
    """Round halves to even and clip to signed integers of this many bits, as int8."""
    return scaled.round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1).to(torch.int8)
