"""Round to nearest, int8, one scale an output row: Golden Stick's rtn-a16w8, bit for bit.

scale = 2 * absmax / 255 in float32, then in the weight's type; q = clip(round(w / scale), -128, 127) in the weight's
type, halves to even (mindspore-ai/golden-stick v0.6.0, quantization/quant_utils.py). Knows one matrix.
"""

import torch


def quantize_rows(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """weight [rows, columns] to int8 [rows, columns] and scale [rows, 1] in the weight's type.

    An all-zero row gets scale 1 and zeros (the original writes scale 0, which divides by zero).
    """
    largest = weight.abs().amax(dim=1, keepdim=True).float()
    scale = (2 * largest / 255).to(weight.dtype)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return (weight / scale).round().clamp(-128, 127).to(torch.int8), scale
