"""Gated activations that the backends lack."""

import math

import torch


def gelu_multiply(gate_up: torch.Tensor) -> torch.Tensor:
    """GELU (tanh approximation) of the first half of each row times the second half: [T, 2 size] to [T, size].

    x / (1 + exp(-2 u)) equals x / 2 * (1 + tanh(u)). PyTorch's tanh and gelu round the last elements of a tensor differently.
    """
    gate, up = gate_up.chunk(2, dim=1)
    wide = gate.float()
    inner = (wide * wide * 0.044715 + 1) * wide * (-2 * math.sqrt(2 / math.pi))
    return (wide / torch.exp(inner).add_(1)).mul_(up).to(gate_up.dtype)


def limit(values: torch.Tensor, softcap: float) -> torch.Tensor:
    """Return softcap * tanh(values / softcap) of a float32 tensor, in float64 for the same reason."""
    return (softcap - 2 * softcap / torch.exp(values.double() * (2 / softcap)).add_(1)).float()
