"""Rotary position embedding in Hugging Face's half-split form, with scaled frequencies.

Angles are computed with numpy, element by element in a fixed order: PyTorch's cos and sin may differ in the last bit depending on the
tensor length and the number of threads.
"""

import numpy as np
import torch

from model.spec.config import LlamaConfig
from model.spec.rope_scaling import attention_factor, compute_frequencies


class Rotary:
    """Rotary angles of one model."""

    def __init__(self, config: LlamaConfig, *, local: bool = False) -> None:
        """`local`: of layers with a window."""
        own = config.local_rope_theta if local else None
        theta, scaling = (config.rope_theta, config.rope_scaling) if own is None else (own, None)
        self._frequencies = compute_frequencies(theta, config.head_dim, scaling)
        self._factor = np.float32(attention_factor(scaling))

    def angles(self, positions: list[int], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cos and signed sin, each float32 [tokens, 1, head_dim], for `rotate`."""
        angle = (np.asarray(positions, dtype=np.float32)[:, None] * self._frequencies).astype(np.float64)
        cos, sin = np.cos(angle).astype(np.float32) * self._factor, np.sin(angle).astype(np.float32) * self._factor
        both = np.concatenate((cos, cos), axis=1), np.concatenate((-sin, sin), axis=1)
        return torch.from_numpy(both[0])[:, None].to(device), torch.from_numpy(both[1])[:, None].to(device)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate [tokens, heads, head_dim] by its positions' angles, in float32; the result has the dtype of x."""
    wide = x.float()
    return (wide * cos).add_(wide.roll(x.shape[-1] // 2, -1) * sin).to(x.dtype)
