"""Backends built on PyTorch operators. The CPU backend is the reference for the native kernels' tests."""

import torch
import torch.nn.functional as F

from model.backends.device_types import TORCH, is_host_memory
from model.backends.float_linear import float_linear, is_split_invariant
from model.backends.int8 import PLAIN, Int8Kernel, choose_cpu_kernel
from model.backends.interface import PagedAttention, StepRecorder
from model.backends.largest import find_largest
from model.kernels.library import Kernels

_ALIGNED_ELEMENTS = 16
"""float32 elements of 64 bytes."""


class TorchBackend:
    """Any device that PyTorch supports."""

    name = TORCH
    kernels: Kernels | None = None
    batch_invariant = False
    recorder: StepRecorder | None = None
    paged_attention: PagedAttention | None = None

    def __init__(self, device_type: str) -> None:
        self._device_type, self.in_host_memory = device_type, is_host_memory(device_type)
        self.int8_kernel: Int8Kernel = PLAIN

    def open_device(self, local_rank: int) -> torch.device:
        """Return the visible device with the rank's number on its host, counted in a circle, and make it current."""
        index = local_rank % torch.accelerator.device_count()
        torch.accelerator.set_device_index(index)
        return torch.device(self._device_type, index)

    def identify(self, device: torch.device) -> str | None:
        """Return the UUID that the device's driver reports."""
        read = getattr(torch.get_device_module(device), "get_device_properties", None)
        uuid = None if read is None else getattr(read(device.index), "uuid", None)
        return None if uuid is None else str(uuid)

    def count_bytes(self, device: torch.device) -> int:
        """As counted by PyTorch's allocator."""
        return int(torch.accelerator.memory_allocated(device))

    def count_peak_bytes(self, device: torch.device) -> int:
        """As counted by PyTorch's allocator."""
        return int(torch.accelerator.max_memory_allocated(device))

    def is_split_invariant(self, dtype: torch.dtype, num_threads: int) -> bool:
        """Return False: accelerator matmuls give no guarantee."""
        return False

    def float_linear(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """PyTorch's own matmul."""
        return F.linear(x, weight)

    def rms_norm(self, hidden: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """Computed in float32, rounded as in Hugging Face transformers."""
        if delta is not None:
            hidden.add_(delta)
        normed = F.rms_norm(hidden.float(), weight.shape, None, eps)
        return normed.to(hidden.dtype).mul_(weight)

    def silu_multiply(self, gate_up: torch.Tensor) -> torch.Tensor:
        """Uses exp, + and / separately: PyTorch's silu rounds the last elements of a tensor differently."""
        gate, up = gate_up.chunk(2, dim=1)
        wide = gate.float()
        return (wide / torch.exp(-wide).add_(1)).mul_(up).to(gate_up.dtype)

    def attend(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Scaled dot-product attention; in float32 if the dtypes of cache and query differ."""
        return self._attend_scaled(query, keys, values, mask, query.shape[-1] ** -0.5)

    def find_largest(self, logits: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Found by one key per value, see `model/backends/largest.py`."""
        return find_largest(logits, count)

    def _attend_scaled(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None, scale: float
    ) -> torch.Tensor:
        dtype = query.dtype
        if keys.dtype != dtype:
            query, keys, values = query.float(), keys.float(), values.float()
        shape = (keys.shape[0], query.shape[1], *keys.shape[1:])
        causal = mask is None and query.shape[2] > 1
        # A stride of 0 repeats a KV head for its group without a copy.
        out = F.scaled_dot_product_attention(
            query, keys.unsqueeze(1).expand(shape), values.unsqueeze(1).expand(shape), attn_mask=mask, is_causal=causal, scale=scale
        )
        return out.to(dtype)


class TorchCpuBackend(TorchBackend):
    """A CPU without native kernels."""

    def __init__(self) -> None:
        super().__init__("cpu")
        self.int8_kernel = choose_cpu_kernel()

    def open_device(self, local_rank: int) -> torch.device:
        """Return the CPU, which all ranks of a host share."""
        return torch.device("cpu")

    def identify(self, device: torch.device) -> str | None:
        """Return None: a host has one."""
        return None

    def count_bytes(self, device: torch.device) -> int:
        """Return 0."""
        return 0

    def count_peak_bytes(self, device: torch.device) -> int:
        """Return 0."""
        return 0

    def is_split_invariant(self, dtype: torch.dtype, num_threads: int) -> bool:
        """Check on a sample."""
        return is_split_invariant(dtype, num_threads)

    def float_linear(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """A matmul in a shape that is bitwise reproducible."""
        return float_linear(x, weight)

    def attend(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Computed in float32. Measured for one query over 1000 keys: bfloat16 965 us, converted to float32 first
        195 us; float16 1643 us.
        """
        # Rows at whole vectors of memory: how a row lies may decide the low-order bits, and depends on the heads of the rank.
        missing = -query.shape[-1] % _ALIGNED_ELEMENTS
        wide = [F.pad(tensor.float(), (0, missing)) if missing else tensor.float() for tensor in (query, keys, values)]
        out = self._attend_scaled(wide[0], wide[1], wide[2], mask, query.shape[-1] ** -0.5)
        return out[..., : query.shape[-1]].to(query.dtype)
