"""The backend for accelerators that Triton compiles for."""

import torch

from model.backends.cuda_graphs import CudaGraphRecorder
from model.backends.int8 import PLAIN, Int8Kernel
from model.backends.paged import PagedRows, StoredLayer
from model.backends.torch_backends import TorchBackend
from model.backends.triton_kernels.activation import multiply_silu
from model.backends.triton_kernels.attention import attend, tokens_per_tile
from model.backends.triton_kernels.cache_write import write_cache
from model.backends.triton_kernels.float_linear import multiply_floats
from model.backends.triton_kernels.integer_linears import IntegerLinears
from model.backends.triton_kernels.norm import normalize


class TritonPagedAttention:
    """Two kernels in prefill, three in decoding."""

    def tokens_per_tile(self, heads: int, kv_heads: int) -> int:
        """Return the number of tokens whose query heads fill a tile."""
        return tokens_per_tile(heads, kv_heads)

    def attend(
        self,
        qkv: torch.Tensor,
        heads: int,
        kv_heads: int,
        angles: tuple[torch.Tensor, torch.Tensor],
        layer: StoredLayer,
        paged: PagedRows,
        window: int | None,
        softcap: float | None,
    ) -> torch.Tensor:
        """Rotate, write to the cache, and attend."""
        query = write_cache(qkv.contiguous(), heads, kv_heads, angles, layer, paged)
        return attend(query, heads, kv_heads, layer, paged, window, softcap)


class TritonBackend(TorchBackend):
    """Kernels of our own: integer linears with the CPU's bits, floats with bits that depend on neither batch nor ranks."""

    name = "triton"
    batch_invariant = True

    def __init__(self, device_type: str) -> None:
        super().__init__(device_type)
        self.paged_attention = TritonPagedAttention()
        self._linears = IntegerLinears()
        self.int8_kernel = Int8Kernel("int8-sliced-triton", PLAIN.pack, PLAIN.multiply, linears=self._linears)
        self.recorder = CudaGraphRecorder() if device_type == "cuda" else None

    def is_split_invariant(self, dtype: torch.dtype, num_threads: int) -> bool:
        """Return True: a program computes its rows whole, in a fixed order."""
        return True

    def float_linear(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """One product, whose bits depend on a row and a weight row only."""
        return multiply_floats(x, weight)

    def rms_norm(self, hidden: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """Addition, norm and the slices for an integer linear in one pass."""
        slices = self._linears.count_norm_slices(hidden)
        out, q, row_scale = normalize(hidden, delta, weight, eps, slices)
        if slices:
            self._linears.keep_slices(out, q, row_scale)
        return out

    def silu_multiply(self, gate_up: torch.Tensor) -> torch.Tensor:
        """Activation and multiplication in one pass."""
        return multiply_silu(gate_up)
