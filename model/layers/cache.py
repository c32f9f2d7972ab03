"""Keys and values of sequences, in blocks of tokens out of one memory.

A store is the memory of all layers; a cache is one sequence in it, a list of blocks that need not lie in order. Several caches may
name the same block. Knows tensors and block numbers; not who owns a block (`model/engine/block_pool.py`), no ranks.
"""

from typing import Protocol

import torch

from model.spec.config import check_blocks


class Cache(Protocol):
    """What a forward pass needs of the keys and values of one sequence."""

    length: int
    """Tokens so far."""

    def append(self, layer: int, keys: torch.Tensor, values: torch.Tensor, scale: torch.Tensor | None = None) -> None:
        """Take [tokens, heads, head_dim] of new tokens."""
        ...

    def read(self, layer: int, scale: torch.Tensor | None, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the first `end` tokens, those just taken included, each [heads, end, head_dim]."""
        ...


class KeyValueStore:
    """Memory of keys and values: `data` [layers, blocks, 2 (keys, values), key-value heads, block_size, head_dim].

    As int8 they are rounded to multiples of a scale: a stored one (`append` gets it), or one that each token of each head
    gets when it comes, which is kept in `scales` [layers, blocks, 2, key-value heads, block_size].
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
    ) -> None:
        """`quantized`: a kv_cache word of model/spec/scheme.py. Raises ConfigError for a block size that kernels cannot read."""
        check_blocks(block_size, num_blocks)
        shape = (num_layers, num_blocks, 2, num_kv_heads, block_size)
        # Memory of torch.empty costs nothing until it is written: blocks that nobody has used are free.
        self.data = torch.empty((*shape, head_dim), dtype=torch.int8 if quantized else dtype, device=device)
        self.scales = torch.empty(shape, dtype=torch.float32, device=device) if quantized == "token" else None
        self.block_size, self.num_blocks, self.quantized = block_size, num_blocks, quantized

    @property
    def bytes_per_token(self) -> int:
        """What one token takes in all layers."""
        tensors = [self.data] if self.scales is None else [self.data, self.scales]
        return sum(tensor.nbytes for tensor in tensors) // (self.num_blocks * self.block_size)


class KeyValueCache:
    """Keys and values of one sequence: the blocks of a store that it fills, in order. Whoever owns it appends blocks in time."""

    def __init__(self, store: KeyValueStore, blocks: list[int]) -> None:
        self.store, self.blocks, self.length = store, blocks, 0

    def append(self, layer: int, keys: torch.Tensor, values: torch.Tensor, scale: torch.Tensor | None = None) -> None:
        """Write [tokens, heads, head_dim] behind the sequence.

        `scale`: stored scales of an int8 cache, float32 [2, heads, 1, head_dim].
        The length grows when the caller sets `length` after the last layer.
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

    def read(self, layer: int, scale: torch.Tensor | None, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the first `end` tokens, each [heads, end, head_dim] without gaps; float32 where they are kept as int8."""
        store = self.store
        whole = self._join(store.data[layer], end)
        if store.quantized:
            if store.scales is not None:
                scale = self._join(store.scales[layer], end).unsqueeze(3)
            assert scale is not None
            whole = whole.float().mul_(scale)
        return whole[0], whole[1]

    def _write(self, memory: torch.Tensor, new: torch.Tensor, first: int, end: int) -> None:
        """Put [2, heads, tokens, …] at the places first to end of the sequence, into [blocks, 2, heads, block_size, …]."""
        size, done = self.store.block_size, first
        while done < end:
            offset = done % size
            count = min(size - offset, end - done)
            memory[self.blocks[done // size], :, :, offset : offset + count] = new[:, :, done - first : done - first + count]
            done += count

    def _join(self, memory: torch.Tensor, end: int) -> torch.Tensor:
        """The first `end` places of [blocks, 2, heads, block_size, …] as one [2, heads, end, …]."""
        size = self.store.block_size
        full, rest = divmod(end, size)
        parts = [memory[block] for block in self.blocks[:full]]
        if rest:
            parts.append(memory[self.blocks[full], :, :, :rest])
        return torch.cat(parts, dim=2)
