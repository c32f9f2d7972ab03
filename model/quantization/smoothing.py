"""SmoothQuant: scales that move outliers of the activations into the weights.

    s = act_absmax^alpha / weight_absmax^(1 - alpha), at least 1e-5, 1 where either is 0     (Golden Stick, arXiv 2211.10438)

The weight is multiplied by s, the activation divided by it.
"""

import torch


def smooth_scale(act_absmax: torch.Tensor, weight_absmax: torch.Tensor, alpha: float) -> torch.Tensor:
    """Return float32 [columns], given the largest magnitudes of each input channel, both [columns]."""
    act, weight = act_absmax.float().pow(alpha), weight_absmax.float().pow(1 - alpha)
    scale = (act / weight).clamp_min(1e-5)
    return torch.where((act == 0) | (weight == 0), torch.ones_like(scale), scale)
