"""Where the rows of a pass lie in the paged KV cache, in the form that a device's attention takes."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

CHUNK_TOKENS = 256
"""Tokens whose attention is computed by itself and then joined to that of the tokens before, in order. Part of a result's bits."""
SPLIT_TOKENS = 8
"""New tokens per sequence up to which the chunks of a sequence are spread over programs: decoding and verified drafts."""


@dataclass(frozen=True, slots=True)
class StoredLayer:
    """The KV cache of one layer."""

    data: torch.Tensor
    """[blocks, 2 (keys, values), KV heads, block_size, head_dim]."""
    token_scales: torch.Tensor | None
    """float32 [blocks, 2, KV heads, block_size], of an int8 cache with a scale per token and head."""
    fixed_scales: torch.Tensor | None
    """float32 [2, KV heads, 1, head_dim], of an int8 cache with stored scales."""


@dataclass(frozen=True, slots=True)
class PagedRows:
    """The rows of a pass whose KV caches are in one store; int32 tensors on the device. A negative position marks padding."""

    rows: torch.Tensor
    """[rows, 2]: position in the sequence, row of `table`."""
    tiles: torch.Tensor
    """[tiles, 4]: first row, number of rows, position of the first, row of `table`."""
    table: torch.Tensor
    """[sequences, blocks]: the blocks of each sequence, in order."""
    chunks: int
    """Chunks of the longest sequence, or more."""
    splits: bool
    """Whether chunks are spread over programs. Changes no bit."""


def place_rows(
    sequences: Sequence[tuple[int, int, Sequence[int]]],
    tile_tokens: int,
    block_size: int,
    device: torch.device,
    *,
    splits: bool | None = None,
) -> PagedRows:
    """Build the rows of sequences, each given as (earlier tokens, new tokens, blocks).

    `tile_tokens`: most tokens of a tile. `splits`: None: where all sequences have few new tokens.
    """
    splits = all(count <= SPLIT_TOKENS for _, count, _ in sequences) if splits is None else splits
    step = 1 if splits else tile_tokens
    rows, tiles, first = [], [], 0
    for owner, (before, count, _) in enumerate(sequences):
        rows += [(before + place, owner) for place in range(count)]
        tiles += [(first + place, min(step, count - place), before + place, owner) for place in range(0, count, step)]
        first += count
    # Only the blocks in use: a sequence may own more.
    used = [blocks[: -(-(before + count) // block_size)] for before, count, blocks in sequences]
    width = max(map(len, used))
    table = [[*blocks, *[0] * (width - len(blocks))] for blocks in used]
    longest = max(before + count for before, count, _ in sequences)
    tensors = [torch.tensor(numbers, dtype=torch.int32).to(device) for numbers in (rows, tiles, table)]
    return PagedRows(tensors[0], tensors[1], tensors[2], -(-longest // CHUNK_TOKENS), splits)
