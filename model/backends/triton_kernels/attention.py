"""Attention over the paged KV cache in chunks of 256 tokens, combined in order.

A row is computed alike in decoding and prefill, alone or in a batch: its keys come in the same blocks and chunks, and what is masked adds
exactly nothing. Decoding spreads the chunks over programs, prefill walks them in one; the bits are the same.
"""

import torch
import triton
import triton.language as tl

from model.backends.paged import CHUNK_TOKENS, PagedRows, StoredLayer
from model.backends.triton_kernels.arithmetic import divide
from model.backends.triton_kernels.cache_write import find_scales
from model.backends.triton_kernels.launching import cover, launch

_STEP = 64
"""Keys at a time."""
_TILE_ROWS = 16
"""Rows of a tile: tokens times the query heads of a KV head."""


@triton.jit
def join_chunks(out, top, total, more_out, more_top, more_total):
    """Join the weighted sum, largest score and sum of weights of a chunk to those of the chunks before it."""
    new = tl.maximum(top, more_top)
    shift = tl.where(new == float("-inf"), 0.0, new)
    old, fresh = tl.exp(top - shift), tl.exp(more_top - shift)
    return out * old[:, None] + more_out * fresh[:, None], new, total * old + more_total * fresh


@triton.jit
def divide_rows(sums, total, ROWS: tl.constexpr, BD: tl.constexpr):
    """Divide each row by its sum of weights; zero where it has none, which is padding."""
    return divide(sums, tl.where(total == 0.0, 1.0, total)[:, None] + tl.zeros((ROWS, BD), tl.float32))


@triton.jit
def attend_chunk(
    query, data, scales, table_row, first, position, kv_head, window, softcap, scale,
    KV_HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, CACHE: tl.constexpr, CAPPED: tl.constexpr,
    ROWS: tl.constexpr, BD: tl.constexpr, STEP: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Attend with query [ROWS, BD] over tokens first .. first + CHUNK of one sequence, up to each row's position int32 [ROWS]."""
    d, t = tl.arange(0, BD), tl.arange(0, STEP)
    out, total = tl.zeros((ROWS, BD), tl.float32), tl.zeros((ROWS,), tl.float32)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    last = tl.max(position, axis=0)
    for begin in range(0, CHUNK, STEP):
        token = first + begin + t
        known = token <= last
        block = tl.load(table_row + token // BLOCK_SIZE, mask=known, other=0).to(tl.int64)
        key_line = ((block * 2) * KV_HEADS + kv_head) * BLOCK_SIZE + token % BLOCK_SIZE
        value_line = key_line + KV_HEADS * BLOCK_SIZE
        place = (d < DIM)[None, :] & known[:, None]
        keys = tl.load(data + key_line[:, None] * DIM + d[None, :], mask=place, other=0.0)
        values = tl.load(data + value_line[:, None] * DIM + d[None, :], mask=place, other=0.0)
        if CACHE == 1:
            keys = keys.to(tl.float32) * tl.load(scales + kv_head * DIM + d, mask=d < DIM, other=0.0)[None, :]
            values = values.to(tl.float32) * tl.load(scales + (KV_HEADS + kv_head) * DIM + d, mask=d < DIM, other=0.0)[None, :]
        # Integers up to 128 are exact in every float dtype; a token's scale is applied to its score and weight.
        score = tl.dot(query, tl.trans(keys.to(query.dtype)), input_precision="ieee") * scale
        if CACHE == 2:
            score = score * tl.load(scales + key_line, mask=known, other=0.0)[None, :]
        if CAPPED:
            cap = softcap + tl.zeros((ROWS, STEP), tl.float32)
            score = cap - divide(2.0 * cap, tl.exp(divide(2.0 * score, cap)) + 1.0)
        seen = (token[None, :] <= position[:, None]) & (token[None, :] > position[:, None] - window)
        score = tl.where(seen, score, float("-inf"))
        new = tl.maximum(top, tl.max(score, axis=1))
        shift = tl.where(new == float("-inf"), 0.0, new)
        weight, old = tl.exp(score - shift[:, None]), tl.exp(top - shift)
        total = total * old + tl.sum(weight, axis=1)
        if CACHE == 2:
            weight = weight * tl.load(scales + value_line, mask=known, other=0.0)[None, :]
        out = out * old[:, None] + tl.dot(weight.to(query.dtype), values.to(query.dtype), input_precision="ieee")
        top = new
    return out, top, total


@triton.jit
def attend_tiles(
    query_rows, data, scales, tiles, table, out, partial, summary, table_width, scale, window, softcap, chunks,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, CACHE: tl.constexpr, CAPPED: tl.constexpr,
    GROUP: tl.constexpr, ROWS: tl.constexpr, BD: tl.constexpr, STEP: tl.constexpr, CHUNK: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """One program per tile of tokens and KV head, and with SPLIT per chunk; GROUP: query heads per KV head, padded.

    tiles int32 [tiles, 4]: first row, number of rows, position of the first (negative: padding), row of the block table. out [rows, HEADS *
    DIM]. With SPLIT: partial float32 [tiles, KV_HEADS, chunks, ROWS, BD] and summary [..., 2, ROWS].
    """
    number, kv_head, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    first, count = tl.load(tiles + number * 4), tl.load(tiles + number * 4 + 1)
    begin, owner = tl.load(tiles + number * 4 + 2), tl.load(tiles + number * 4 + 3)
    r, d = tl.arange(0, ROWS), tl.arange(0, BD)
    token, head = r // GROUP, r % GROUP
    present = (token < count) & (head < HEADS // KV_HEADS)
    position = tl.where(present, begin + token, -1)
    end = begin + count
    row = (first + token).to(tl.int64)
    query_head = kv_head * (HEADS // KV_HEADS) + head
    inside = present[:, None] & (d < DIM)[None, :]
    query = tl.load(query_rows + row[:, None] * (HEADS * DIM) + query_head[:, None] * DIM + d[None, :], mask=inside, other=0.0)
    table_row = table + owner.to(tl.int64) * table_width
    if SPLIT:
        place = (number * KV_HEADS + kv_head) * chunks + chunk
        if (chunk * CHUNK < end) & (begin >= 0):
            sums, top, total = attend_chunk(
                query, data, scales, table_row, chunk * CHUNK, position, kv_head, window, softcap, scale,
                KV_HEADS, DIM, BLOCK_SIZE, CACHE, CAPPED, ROWS, BD, STEP, CHUNK,
            )  # fmt: skip
            tl.store(partial + (place * ROWS + r)[:, None] * BD + d[None, :], sums)
            tl.store(summary + place * 2 * ROWS + r, top)
            tl.store(summary + (place * 2 + 1) * ROWS + r, total)
    else:
        sums, total = tl.zeros((ROWS, BD), tl.float32), tl.zeros((ROWS,), tl.float32)
        top = tl.full((ROWS,), float("-inf"), tl.float32)
        start = 0
        while start < end:
            more, more_top, more_total = attend_chunk(
                query, data, scales, table_row, start, position, kv_head, window, softcap, scale,
                KV_HEADS, DIM, BLOCK_SIZE, CACHE, CAPPED, ROWS, BD, STEP, CHUNK,
            )  # fmt: skip
            sums, top, total = join_chunks(sums, top, total, more, more_top, more_total)
            start += CHUNK
        result = divide_rows(sums, total, ROWS, BD)
        place = row[:, None] * (HEADS * DIM) + query_head[:, None] * DIM + d[None, :]
        tl.store(out + place, result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def combine_chunks(
    tiles, out, partial, summary, chunks,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, BD: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """Join the chunks of attend_tiles in order, one program per tile and KV head."""
    number, kv_head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    first, count = tl.load(tiles + number * 4), tl.load(tiles + number * 4 + 1)
    begin = tl.load(tiles + number * 4 + 2)
    r, d = tl.arange(0, ROWS), tl.arange(0, BD)
    token, head = r // GROUP, r % GROUP
    sums, total = tl.zeros((ROWS, BD), tl.float32), tl.zeros((ROWS,), tl.float32)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    end = tl.where(begin >= 0, begin + count, 0)
    chunk = 0
    while chunk * CHUNK < end:
        place = (number * KV_HEADS + kv_head) * chunks + chunk
        more = tl.load(partial + (place * ROWS + r)[:, None] * BD + d[None, :])
        more_top = tl.load(summary + place * 2 * ROWS + r)
        more_total = tl.load(summary + (place * 2 + 1) * ROWS + r)
        sums, top, total = join_chunks(sums, top, total, more, more_top, more_total)
        chunk += 1
    result = divide_rows(sums, total, ROWS, BD)
    inside = ((token < count) & (head < HEADS // KV_HEADS))[:, None] & (d < DIM)[None, :]
    row, query_head = (first + token).to(tl.int64), kv_head * (HEADS // KV_HEADS) + head
    place = row[:, None] * (HEADS * DIM) + query_head[:, None] * DIM + d[None, :]
    tl.store(out + place, result.to(out.dtype.element_ty), mask=inside)


def tokens_per_tile(heads: int, kv_heads: int) -> int:
    """Return the number of tokens of a tile."""
    return max(1, _TILE_ROWS // cover(heads // kv_heads))


def attend(
    query: torch.Tensor, heads: int, kv_heads: int, layer: StoredLayer, paged: PagedRows, window: int | None, softcap: float | None
) -> torch.Tensor:
    """Attend with rotated queries [rows, heads * head_dim] over their sequences: the same shape."""
    block_size, dim = layer.data.shape[-2:]
    scales, cache = find_scales(layer)
    group = cover(heads // kv_heads)
    height, tiles = max(_TILE_ROWS, group), paged.tiles.shape[0]
    shape = {
        "HEADS": heads,
        "KV_HEADS": kv_heads,
        "DIM": dim,
        "GROUP": group,
        "ROWS": height,
        "BD": max(16, cover(dim)),
        "CHUNK": CHUNK_TOKENS,
    }
    out = torch.empty_like(query)
    partial = summary = out
    if paged.splits:
        partial = torch.empty((tiles, kv_heads, paged.chunks, height, shape["BD"]), dtype=torch.float32, device=query.device)
        summary = torch.empty((tiles, kv_heads, paged.chunks, 2, height), dtype=torch.float32, device=query.device)
    limits = dim**-0.5, (1 << 30) if window is None else window, 1.0 if softcap is None else float(softcap)
    launch(
        attend_tiles, (tiles, kv_heads, paged.chunks if paged.splits else 1), query, layer.data, scales, paged.tiles, paged.table, out,
        partial, summary, paged.table.shape[1], *limits, paged.chunks, BLOCK_SIZE=block_size, CACHE=cache, CAPPED=softcap is not None,
        STEP=_STEP, SPLIT=paged.splits, **shape, num_warps=4, num_stages=2,
    )  # fmt: skip
    if paged.splits:
        launch(combine_chunks, (tiles, kv_heads), paged.tiles, out, partial, summary, paged.chunks, **shape, num_warps=4)
    return out
