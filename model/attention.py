"""Attention of one sequence over its own keys and values, the same bits for any split of the heads and any threads.

PyTorch's flash kernel computes each query head by itself; it is bitwise reproducible on one thread, not on several.
So every call runs on one thread, and heads are dealt to the threads of a pool where there is work for several.
Knows tensors of one sequence; no layers, no ranks.
"""

from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import torch
import torch.nn.functional as F

_PARALLEL_WORK = 1 << 18
"""Query rows x keys x width below which a second thread costs more than it brings."""


class Cache(Protocol):
    """What a forward pass needs of the keys and values of one sequence."""

    length: int
    """Tokens so far."""

    def append(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor, scale: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take [tokens, heads, head_dim] of new tokens; give all keys and values, [heads, tokens so far, head_dim]."""
        ...


class KeyValueCache:
    """Keys and values of one sequence, all layers: [layers, 2, key-value heads, capacity, head_dim].

    As int8 they are rounded to multiples of a scale: a stored one (`append` gets it), or one that each token of each head
    gets when it comes, which is kept beside it.
    """

    def __init__(
        self,
        num_layers: int,
        num_kv_heads: int,
        capacity: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        quantized: str | None = None,
    ) -> None:
        """`quantized`: a kv_cache word of model/scheme.py."""
        # Memory of torch.empty costs nothing until it is written: a long capacity is free for a short sequence.
        shape = (num_layers, 2, num_kv_heads, capacity)
        self._data = torch.empty((*shape, head_dim), dtype=torch.int8 if quantized else dtype, device=device)
        self._scales = torch.empty((*shape, 1), dtype=torch.float32, device=device) if quantized == "token" else None
        self._quantized = quantized is not None
        self.capacity, self.length = capacity, 0

    @property
    def bytes_per_token(self) -> int:
        """What one token takes in all layers."""
        tensors = [self._data] if self._scales is None else [self._data, self._scales]
        return sum(tensor.nbytes for tensor in tensors) // self.capacity

    def append(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor, scale: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write [tokens, heads, head_dim] behind the sequence; give all keys and values, [heads, tokens so far, head_dim].

        `scale`: stored scales of an int8 cache, float32 [2, heads, 1, head_dim]. What comes of an int8 cache is float32.
        The length grows when the caller sets `length` after the last layer.
        """
        end = self.length + keys.shape[0]
        data = self._data[layer, :, :, :end]
        if not self._quantized:
            data[0, :, self.length :] = keys.transpose(0, 1)
            data[1, :, self.length :] = values.transpose(0, 1)
            return data[0], data[1]
        new = torch.stack((keys, values)).transpose(1, 2).float()
        used = scale
        if self._scales is not None:
            scale = (new.abs().amax(dim=3, keepdim=True) / 127).clamp_min_(1e-30)
            self._scales[layer, :, :, self.length : end] = scale
            used = self._scales[layer, :, :, :end]
        assert scale is not None and used is not None
        data[:, :, self.length :] = (new / scale).round_().clamp_(-128, 127)
        whole = data.float().mul_(used)
        return whole[0], whole[1]


class Attention:
    """Causal grouped-query attention on a fixed number of threads."""

    def __init__(self, num_threads: int) -> None:
        self._num_threads = num_threads
        self._pool = ThreadPoolExecutor(num_threads, initializer=torch.set_num_threads, initargs=(1,)) if num_threads > 1 else None

    def __call__(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """query [tokens, heads, head_dim], keys and values [kv heads, all tokens, head_dim]: [tokens, heads * head_dim].

        The query's tokens are the last ones of the keys.
        """
        tokens, heads, head_dim = query.shape
        kv_heads, all_tokens, _ = keys.shape
        group = heads // kv_heads
        grouped = query.transpose(0, 1).reshape(kv_heads, group, tokens, head_dim)
        mask = None
        if 1 < tokens < all_tokens:
            mask = torch.ones((tokens, all_tokens), dtype=torch.bool, device=query.device).tril(all_tokens - tokens)
        if self._pool is None or kv_heads == 1 or heads * tokens * all_tokens * head_dim < _PARALLEL_WORK:
            out = _attend_alone(grouped, keys, values, mask)
        else:
            parts = min(self._num_threads, kv_heads)
            tasks = [
                self._pool.submit(_attend, *chunk, mask)
                for chunk in zip(grouped.chunk(parts), keys.chunk(parts), values.chunk(parts), strict=True)
            ]
            out = torch.cat([task.result() for task in tasks])
        return out.reshape(heads, tokens, head_dim).transpose(0, 1).reshape(tokens, heads * head_dim)


def _attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """[kv heads, group, tokens, head_dim] over [kv heads, all tokens, head_dim]."""
    dtype = query.dtype
    if query.device.type == "cpu" or keys.dtype != dtype:
        # Measured for one query over 1000 keys: bfloat16 965 us, turned to float32 first 195 us; float16 even 1643 us.
        query, keys, values = query.float(), keys.float(), values.float()
    shape = (keys.shape[0], query.shape[1], *keys.shape[1:])
    causal = mask is None and query.shape[2] > 1
    # A stride of 0 repeats a key-value head for its group without a copy.
    out = F.scaled_dot_product_attention(
        query, keys.unsqueeze(1).expand(shape), values.unsqueeze(1).expand(shape), attn_mask=mask, is_causal=causal
    )
    return out.to(dtype)


def _attend_alone(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    threads = torch.get_num_threads()
    if threads == 1:
        return _attend(query, keys, values, mask)
    torch.set_num_threads(1)
    try:
        return _attend(query, keys, values, mask)
    finally:
        torch.set_num_threads(threads)
