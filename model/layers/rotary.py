"""Rotary position embedding in Hugging Face's half-split form, with the llama3 frequency scaling.

Angles are made with numpy, element by element in one fixed way: PyTorch's own cos and sin may differ in the last bit
with the length of the tensor and the number of threads. Knows positions and one head's width.
"""

import numpy as np
import torch

from model.spec.config import LlamaConfig, scale_frequency


class Rotary:
    """Angles of one model."""

    def __init__(self, config: LlamaConfig) -> None:
        exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
        frequencies = 1.0 / np.power(np.float32(config.rope_theta), exponents)
        self._frequencies = np.array([scale_frequency(float(f), config.rope_scaling) for f in frequencies], dtype=np.float32)

    def angles(self, positions: list[int], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and signed sin, each float32 [tokens, 1, head_dim], for `rotate`."""
        angle = (np.asarray(positions, dtype=np.float32)[:, None] * self._frequencies).astype(np.float64)
        cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
        both = np.concatenate((cos, cos), axis=1), np.concatenate((-sin, sin), axis=1)
        return torch.from_numpy(both[0])[:, None].to(device), torch.from_numpy(both[1])[:, None].to(device)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn [tokens, heads, head_dim] by its positions' angles, in float32, back in the type of x."""
    wide = x.float()
    return (wide * cos).add_(wide.roll(x.shape[-1] // 2, -1) * sin).to(x.dtype)
