"""How the native kernels keep keys and values: in blocks of 16 tokens, in the order in which they read them.

As in model/kernels/attention_products.h: keys [head_dim][16] and values [16][head_dim], in bfloat16 in pairs: keys
[head_dim / 2][16][2] and values [8][head_dim][2].
"""

import torch

_TOKENS = 16


def view_keys(memory: torch.Tensor) -> torch.Tensor:
    """View keys [..., block_size, head_dim] of a store by token: [..., block_size / 16, 16, head_dim / pair, pair]."""
    *outer, size, head_dim = memory.shape
    pair = _count_pair(memory)
    return memory.view(*outer, size // _TOKENS, head_dim // pair, _TOKENS, pair).transpose(-3, -2)


def view_values(memory: torch.Tensor) -> torch.Tensor:
    """View values [..., block_size, head_dim] of a store by token: [..., block_size / 16, 16 / pair, pair, head_dim]."""
    *outer, size, head_dim = memory.shape
    pair = _count_pair(memory)
    return memory.view(*outer, size // _TOKENS, _TOKENS // pair, head_dim, pair).transpose(-2, -1)


def read_block(block: torch.Tensor) -> torch.Tensor:
    """Return the keys and values [2, heads, block_size, head_dim] of a block, by token."""
    return torch.stack((view_keys(block[0]).reshape(block[0].shape), view_values(block[1]).reshape(block[1].shape)))


def write_block(block: torch.Tensor, first: int, new: torch.Tensor) -> None:
    """Write keys and values [2, heads, tokens, head_dim] to tokens `first` and on of a block [2, heads, block_size, head_dim]."""
    count = new.shape[2]
    tokens = torch.arange(first, first + count, device=new.device)
    keys, values, new = view_keys(block[0]), view_values(block[1]), new.to(block.dtype)
    pair = keys.shape[-1]
    keys[:, tokens // _TOKENS, tokens % _TOKENS] = new[0].reshape(new.shape[1], count, -1, pair)
    values[:, tokens // _TOKENS, tokens % _TOKENS // pair, tokens % pair] = new[1]


def _count_pair(memory: torch.Tensor) -> int:
    return 2 if memory.dtype == torch.bfloat16 else 1
