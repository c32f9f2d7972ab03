"""The device interface of the layers, the loader and the commands. The decoder never checks the device type; it asks its backend."""

from collections.abc import Callable
from typing import Protocol

import torch

from model.backends.int8 import Int8Kernel
from model.backends.paged import PagedRows, StoredLayer
from model.kernels.library import Kernels


class StepBlock(Protocol):
    """Integers that go to the device in one copy."""

    values: torch.Tensor
    """int32 [size], in host memory."""
    on_device: torch.Tensor
    """int32 [size]."""

    def wait(self) -> None:
        """Wait until `values` may be changed."""
        ...

    def send(self) -> None:
        """Start the copy; what is launched after it sees the new values."""
        ...


class StepRecorder(Protocol):
    """Records steps as graphs of the device."""

    def open_block(self, size: int, device: torch.device) -> StepBlock:
        """Allocate the inputs of a recorded step."""
        ...

    def capture(self, step: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        """Record a step; return a function that replays it and returns its result, which the next replay overwrites."""
        ...


class PagedAttention(Protocol):
    """Attention that reads the blocks of the KV cache in place."""

    def tokens_per_tile(self, heads: int, kv_heads: int) -> int:
        """Return the number of tokens that are taken together."""
        ...

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
        """Rotate and append the keys of qkv [T, (heads + 2 kv_heads) * head_dim] to the cache, and attend: [T, heads * head_dim].

        `angles`: cos and signed sin, float32 [T, 1, head_dim]; `window` and `softcap`: as in `model/layers/attention.py`.
        """
        ...


class Backend(Protocol):
    """The operations of one kind of device. Tensors are on that device; shapes: T tokens, H hidden size."""

    name: str
    """Shown in stats: "native" or "torch"."""
    kernels: Kernels | None
    """Native kernels: they take weights as stored, run whole layers in one call, and give a row the same bits in any batch."""
    in_host_memory: bool
    """Whether weights and KV cache are in host memory, so that host limits apply and ranks can share memory."""
    int8_kernel: Int8Kernel
    """The exact integer matmul."""
    batch_invariant: bool
    """Whether a row has the same bits in any batch, in decoding and in prefill."""
    recorder: StepRecorder | None
    """Records a decoding step once and replays it; None where every step is launched anew."""
    paged_attention: PagedAttention | None
    """None where caches are read one by one, for `attend`."""

    def open_device(self, local_rank: int) -> torch.device:
        """Open the device of a rank, given its number among the ranks of its host."""
        ...

    def identify(self, device: torch.device) -> str | None:
        """Return a name of the device that is the same in every process of its host; None if there is none."""
        ...

    def count_bytes(self, device: torch.device) -> int:
        """Return the bytes that this process has allocated on the device; 0 in host memory."""
        ...

    def count_peak_bytes(self, device: torch.device) -> int:
        """Return the largest number of these bytes so far."""
        ...

    def is_split_invariant(self, dtype: torch.dtype, num_threads: int) -> bool:
        """Return whether results are bitwise identical for any number of ranks."""
        ...

    def float_linear(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Multiply x [T, columns] by weight [tiled rows, columns] of the same dtype: [T, tiled rows]."""
        ...

    def rms_norm(self, hidden: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """RMSNorm of hidden [T, H], to which `delta` is added in place first."""
        ...

    def silu_multiply(self, gate_up: torch.Tensor) -> torch.Tensor:
        """silu of the first half of each row times the second half: [T, 2 size] to [T, size]."""
        ...

    def attend(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Causal attention of query [KV heads, group, T, head_dim] over keys and values [KV heads, all tokens, head_dim].

        `mask`: bool [T, all tokens]; None: causal if T > 1. Returns a tensor of the query's shape.
        """
        ...

    def find_largest(self, logits: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the `count` largest values of each row of float32 [T, columns] and their columns, int64: largest first, ties by column.

        NaN counts as the largest value.
        """
        ...
