"""RMSNorm: x / sqrt(mean(x^2) + eps) * weight."""

import torch
from torch import nn

from model.backends.interface import Backend


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, in float32, rounded as in Hugging Face transformers."""

    def __init__(self, size: int, eps: float, dtype: torch.dtype, backend: Backend, *, offset: bool = False) -> None:
        """`offset`: 1 is added to the stored weight, and the result rounded only after the multiplication, as in Gemma."""
        super().__init__()
        self.eps, self._backend, self._offset = eps, backend, offset
        self.weight = nn.Parameter(torch.empty(size, dtype=torch.float32 if offset else dtype, device="meta"), requires_grad=False)

    def assign(self, weight: torch.Tensor, device: torch.device) -> None:
        """Set the weight [hidden]."""
        assert weight.shape == self.weight.shape
        weight = weight.float() + 1 if self._offset else weight
        self.weight = nn.Parameter(weight.to(device, self.weight.dtype), requires_grad=False)

    def forward(self, x: torch.Tensor, delta: torch.Tensor | None = None) -> torch.Tensor:
        """Normalize [T, H]. `delta` is added to x in place first."""
        if self._offset:
            wide = (x if delta is None else x.add_(delta)).float()
            return self._backend.rms_norm(wide, None, self.weight, self.eps).to(x.dtype)
        return self._backend.rms_norm(x, delta, self.weight, self.eps)
