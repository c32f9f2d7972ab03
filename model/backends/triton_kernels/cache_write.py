"""Rotary embedding of queries and keys, and the new keys and values written into the paged KV cache."""

import torch
import triton
import triton.language as tl

from model.backends.paged import PagedRows, StoredLayer
from model.backends.triton_kernels.arithmetic import divide, round_even
from model.backends.triton_kernels.launching import cover, launch

NOT_QUANTIZED, FIXED_SCALES, TOKEN_SCALES = 0, 1, 2
"""How a cache holds keys and values: as they are, as int8 with stored scales, as int8 with a scale per token and head."""


@triton.jit
def rotate_and_write(
    qkv, query, cos, sin, data, scales, rows, table, table_width, block_size,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, CACHE: tl.constexpr,
):  # fmt: skip
    """One program per row and head of qkv [rows, HEADS + 2 KV_HEADS, DIM]: rotated queries go to query [rows, HEADS, DIM],
    keys and values into the cache.

    data [blocks, 2, KV_HEADS, block_size, DIM]; scales float32: by CACHE. cos and sin: float32 [rows, DIM], sin with its sign.
    rows int32 [rows, 2]: position (negative: padding, nothing is written), row of the block table int32 [sequences, table_width].
    """
    row, head, d = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, BLOCK)
    inside = d < DIM
    position, owner = tl.load(rows + row * 2), tl.load(rows + row * 2 + 1)
    place = (row * (HEADS + 2 * KV_HEADS) + head) * DIM
    value = tl.load(qkv + place + d, mask=inside, other=0.0).to(tl.float32)
    if head < HEADS + KV_HEADS:
        other = tl.load(qkv + place + (d + DIM // 2) % DIM, mask=inside, other=0.0).to(tl.float32)
        angle_cos = tl.load(cos + row * DIM + d, mask=inside, other=0.0)
        angle_sin = tl.load(sin + row * DIM + d, mask=inside, other=0.0)
        value = (value * angle_cos + other * angle_sin).to(qkv.dtype.element_ty).to(tl.float32)
    if head < HEADS:
        tl.store(query + (row * HEADS + head) * DIM + d, value.to(qkv.dtype.element_ty), mask=inside)
    elif position >= 0:
        side, kv_head = (head - HEADS) // KV_HEADS, (head - HEADS) % KV_HEADS
        block = tl.load(table + owner * table_width + position // block_size).to(tl.int64)
        line = ((block * 2 + side) * KV_HEADS + kv_head) * block_size + position % block_size
        if CACHE == 0:
            tl.store(data + line * DIM + d, value.to(data.dtype.element_ty), mask=inside)
        else:
            if CACHE == 2:
                largest = tl.max(tl.abs(value), axis=0)
                scale = tl.maximum(divide(largest, 127.0), 1e-30) + tl.zeros((BLOCK,), tl.float32)
                tl.store(scales + line, tl.max(scale, axis=0))
            else:
                scale = tl.load(scales + (side * KV_HEADS + kv_head) * DIM + d, mask=inside, other=1.0)
            left = divide(value, scale)
            left = tl.where(left != left, 0.0, tl.minimum(tl.maximum(left, -1024.0), 1024.0))
            whole = tl.minimum(tl.maximum(round_even(left), -128.0), 127.0)
            tl.store(data + line * DIM + d, whole.to(tl.int32).to(tl.int8), mask=inside)


def write_cache(
    qkv: torch.Tensor, heads: int, kv_heads: int, angles: tuple[torch.Tensor, torch.Tensor], layer: StoredLayer, paged: PagedRows
) -> torch.Tensor:
    """Write keys and values of contiguous qkv [rows, (heads + 2 kv_heads) * head_dim]; return rotated queries [rows, heads * head_dim]."""
    block_size, dim = layer.data.shape[-2:]
    scales, cache = find_scales(layer)
    query = torch.empty((qkv.shape[0], heads * dim), dtype=qkv.dtype, device=qkv.device)
    launch(
        rotate_and_write, (qkv.shape[0], heads + 2 * kv_heads), qkv, query, *angles, layer.data, scales, paged.rows, paged.table,
        paged.table.shape[1], block_size, HEADS=heads, KV_HEADS=kv_heads, DIM=dim, BLOCK=cover(dim), CACHE=cache, num_warps=1,
    )  # fmt: skip
    return query


def find_scales(layer: StoredLayer) -> tuple[torch.Tensor, int]:
    """Return the scales of a layer's KV cache, or any tensor where it has none, and how it holds keys and values."""
    if layer.token_scales is not None:
        return layer.token_scales, TOKEN_SCALES
    if layer.fixed_scales is not None:
        return layer.fixed_scales, FIXED_SCALES
    return layer.data, NOT_QUANTIZED
