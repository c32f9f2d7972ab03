"""The backend for CPUs that support the native kernels."""

import torch

from model.backends.device_types import NATIVE
from model.backends.int8 import build_native_kernel
from model.backends.torch_backends import TorchCpuBackend
from model.kernels.library import Kernels


class NativeCpuBackend(TorchCpuBackend):
    """Native kernels for matmuls, norms, activations and attention over the paged KV cache; PyTorch for other caches."""

    name = NATIVE
    batch_invariant = True

    def __init__(self, kernels: Kernels) -> None:
        super().__init__()
        self.kernels: Kernels = kernels
        self.int8_kernel = build_native_kernel(kernels)

    def is_split_invariant(self, dtype: torch.dtype, num_threads: int) -> bool:
        """Return True: the kernels accumulate every row in a fixed order."""
        return True

    def float_linear(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """One native matmul."""
        return self.kernels.float_linear(x, weight)

    def rms_norm(self, hidden: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """Addition and norm in one pass."""
        return self.kernels.rms_norm(hidden, delta, weight, eps)

    def silu_multiply(self, gate_up: torch.Tensor) -> torch.Tensor:
        """Activation and multiplication in one pass."""
        return self.kernels.silu_multiply(gate_up.contiguous())
