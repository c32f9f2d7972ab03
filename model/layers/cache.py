"""Paged KV cache: keys and values of sequences, in fixed-size blocks.

A store is the memory of all layers. A cache is one sequence in it: a list of blocks in any order. Several caches may share a block;
ownership of blocks is managed in `model/engine/block_pool.py`.
"""

from typing import Protocol

import torch

from model.layers.block_layout import read_block, write_block
from model.spec.config import check_blocks


class Cache(Protocol):
    """The interface between a forward pass and the KV cache of one sequence."""

    length: int
    """Number of tokens so far."""

    def append(self, layer: int, keys: torch.Tensor, values: torch.Tensor, scale: torch.Tensor | None = None) -> None:
        """Append keys and values [tokens, heads, head_dim] of new tokens."""
        ...

    def read(self, layer: int, scale: torch.Tensor | None, end: int, start: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values of tokens [start, end), including those just appended, each [heads, end - start, head_dim]."""
        ...


class KeyValueStore:
    """Memory of a KV cache: `data` [layers, blocks, 2 (keys, values), KV heads, block_size, head_dim].

    In int8, values are rounded to multiples of a scale: either a stored one, passed to `append`, or one per token and head, computed
    when it is appended and kept in `scales` [layers, blocks, 2, KV heads, block_size]. With `for_kernels`, the elements of a block and head
    lie as `model/layers/block_layout.py` describes.
    """

    def __init__(
        self,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        quantized: str | None = None,
        *,
        for_kernels: bool = False,
    ) -> None:
        """`quantized`: a kv_cache type of model/spec/scheme.py. Raises ConfigError for a block size that the kernels do not support."""
        check_blocks(block_size, num_blocks)
        shape = (num_layers, num_blocks, 2, num_kv_heads, block_size)
        # torch.empty does not commit memory until it is written, so unused blocks cost nothing.
        self.data = torch.empty((*shape, head_dim), dtype=torch.int8 if quantized else dtype, device=device)
        self.scales = torch.empty(shape, dtype=torch.float32, device=device) if quantized == "token" else None
        self.block_size, self.num_blocks, self.quantized, self.for_kernels = block_size, num_blocks, quantized, for_kernels

    @property
    def bytes_per_token(self) -> int:
        """Bytes per token over all layers."""
        tensors = [self.data] if self.scales is None else [self.data, self.scales]
        return sum(tensor.nbytes for tensor in tensors) // (self.num_blocks * self.block_size)


class KeyValueCache:
    """KV cache of one sequence: an ordered list of blocks of a store. Its owner appends blocks before they are needed."""

    def __init__(self, store: KeyValueStore, blocks: list[int]) -> None:
        self.store, self.blocks, self.length = store, blocks, 0

    def append(self, layer: int, keys: torch.Tensor, values: torch.Tensor, scale: torch.Tensor | None = None) -> None:
        """Write [tokens, heads, head_dim] at the end of the sequence.

        `scale`: stored scales of an int8 cache, float32 [2, heads, 1, head_dim]. The length does not change until the caller sets
        `length` after the last layer.
        """
        store, first, end = self.store, self.length, self.length + keys.shape[0]
        assert end <= len(self.blocks) * store.block_size, f"{end} tokens need more than {len(self.blocks)} blocks of {store.block_size}"
        new = torch.stack((keys, values)).transpose(1, 2)  # [2, heads, tokens, head_dim]
        if store.quantized:
            new = new.float()
            if store.scales is not None:
                scale = (new.abs().amax(dim=3, keepdim=True) / 127).clamp_min_(1e-30)
                self._write(store.scales[layer], scale.squeeze(3), first, end)
            assert scale is not None
            new = (new / scale).round_().clamp_(-128, 127)
        self._write(store.data[layer], new, first, end)

    def read(self, layer: int, scale: torch.Tensor | None, end: int, start: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values of tokens [start, end), each [heads, end - start, head_dim]; float32 if stored as int8."""
        store = self.store
        whole = self._join(store.data[layer], start, end)
        if store.quantized:
            if store.scales is not None:
                scale = self._join(store.scales[layer], start, end).unsqueeze(3)
            assert scale is not None
            whole = whole.float().mul_(scale)
        return whole[0], whole[1]

    def _write(self, memory: torch.Tensor, new: torch.Tensor, first: int, end: int) -> None:
        """Write [2, heads, tokens, …] at positions first to end of the sequence into [blocks, 2, heads, block_size, …]."""
        size, done = self.store.block_size, first
        while done < end:
            offset = done % size
            count = min(size - offset, end - done)
            part, block = new[:, :, done - first : done - first + count], memory[self.blocks[done // size]]
            if self.store.for_kernels and part.dim() == 4:
                write_block(block, offset, part)
            else:
                block[:, :, offset : offset + count] = part
            done += count

    def _join(self, memory: torch.Tensor, start: int, end: int) -> torch.Tensor:
        """Gather positions [start, end) of [blocks, 2, heads, block_size, …] into one [2, heads, end - start, …]."""
        size = self.store.block_size
        first, stop = start // size, -(-end // size)
        parts = [memory[block] for block in self.blocks[first:stop]]
        if self.store.for_kernels and memory.dim() == 5:
            parts = [read_block(part) for part in parts]
        if end % size:
            parts[-1] = parts[-1][:, :, : end % size]
        parts[0] = parts[0][:, :, start % size :]
        return torch.cat(parts, dim=2)
