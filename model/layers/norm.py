"""RMSNorm: x / sqrt(mean(x^2) + eps) * weight."""

import torch
from torch import nn

from model.backends.interface import Backend


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, in float32, rounded as in Hugging Face transformers."""

    def __init__(self, size: int, eps: float, dtype: torch.dtype, backend: Backend) -> None:
        super().__init__()
        self.eps, self._backend = eps, backend
        self.weight = nn.Parameter(torch.empty(size, dtype=dtype, device="meta"), requires_grad=False)

    def assign(self, weight: torch.Tensor, device: torch.device) -> None:
        """Set the weight [hidden]."""
        assert weight.shape == self.weight.shape
        self.weight = nn.Parameter(weight.to(device, self.weight.dtype), requires_grad=False)

    def forward(self, x: torch.Tensor, delta: torch.Tensor | None = None) -> torch.Tensor:
        """Normalize [T, H]. `delta` is added to x in place first."""
        return self._backend.rms_norm(x, delta, self.weight, self.eps)
