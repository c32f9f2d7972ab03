"""The integer product of slices and an int8 weight: sums of integers are exact in any order, so tiles and the split of K are free."""

import torch
import triton
import triton.language as tl

from model.backends.triton_kernels.arithmetic import divide
from model.backends.triton_kernels.launching import divide_up, launch

MOST_COLUMNS = 131072
"""128 * 127 * 131072 < 2^31: a longer sum could leave int32."""
_WIDE_ROWS = 64
"""Rows of slices from which tiles are large."""
_PROGRAMS = 128
"""Programs that keep a GPU busy; K is split where a product has fewer."""


@triton.jit
def join_slices(y, ROWS: tl.constexpr, SLOTS: tl.constexpr, SLICES: tl.constexpr, BN: tl.constexpr):
    """Join the float32 products y [SLOTS * ROWS, BN] of the slices of ROWS rows: [ROWS, BN]."""
    split = tl.reshape(y, (SLOTS, ROWS, BN))
    slot = tl.arange(0, SLOTS)[:, None, None]
    total = tl.sum(tl.where(slot == SLICES - 1, split, 0.0), axis=0)
    for back in tl.static_range(1, SLICES):
        total = divide(total, tl.full((ROWS, BN), 254.0, tl.float32)) + tl.sum(tl.where(slot == SLICES - 1 - back, split, 0.0), axis=0)
    return total


@triton.jit
def int8_product(
    q, weight, scale, row_scale, correction, out, partial, rows, outputs,
    K: tl.constexpr, GROUPS: tl.constexpr, STEPS: tl.constexpr, SPLIT: tl.constexpr, SLICES: tl.constexpr, CORRECTED: tl.constexpr,
    ROWS: tl.constexpr, SLOTS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out [rows, outputs]: q int8 [SLICES, rows, K] by weight int8 [outputs, K], scale [outputs, GROUPS], groups of STEPS * BK columns.

    A tile has SLOTS * ROWS rows: ROWS rows of x, with every slice. With SPLIT > 1, each program stores the integer sums of its part of K
    in partial int32 [SPLIT, SLICES, rows, outputs] instead.
    """
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    tile = tl.arange(0, SLOTS * ROWS)
    one, m = tile // ROWS, tl.program_id(1) * ROWS + tile % ROWS
    present, inside = (one < SLICES) & (m < rows), n < outputs
    k = tl.arange(0, BK)
    x_place = q + (one * rows + m).to(tl.int64)[:, None] * K + k[None, :]
    w_place = weight + n.to(tl.int64)[None, :] * K + k[:, None]
    if GROUPS == 1:
        sums = tl.zeros((SLOTS * ROWS, BN), dtype=tl.int32)
        part = tl.program_id(2)
        for step in range(STEPS // SPLIT):
            first = (step * SPLIT + part) * BK
            x = tl.load(x_place + first, mask=present[:, None], other=0)
            w = tl.load(w_place + first, mask=inside[None, :], other=0)
            sums = tl.dot(x, w, acc=sums, out_dtype=tl.int32)
        if SPLIT > 1:
            place = ((part * SLICES + one) * rows + m).to(tl.int64)[:, None] * outputs + n[None, :]
            tl.store(partial + place, sums, mask=present[:, None] & inside[None, :])
        y = sums.to(tl.float32) * tl.load(scale + n, mask=inside, other=0.0)[None, :]
    else:
        y = tl.zeros((SLOTS * ROWS, BN), dtype=tl.float32)
        for group in range(GROUPS):
            sums = tl.zeros((SLOTS * ROWS, BN), dtype=tl.int32)
            for step in range(STEPS):
                first = (group * STEPS + step) * BK
                x = tl.load(x_place + first, mask=present[:, None], other=0)
                w = tl.load(w_place + first, mask=inside[None, :], other=0)
                sums = tl.dot(x, w, acc=sums, out_dtype=tl.int32)
            y += sums.to(tl.float32) * tl.load(scale + n * GROUPS + group, mask=inside, other=0.0)[None, :]
    if SPLIT == 1:
        total = join_slices(y, ROWS, SLOTS, SLICES, BN)
        row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
        if CORRECTED:
            total = total - tl.load(correction + n, mask=inside, other=0.0)[None, :]
        total = total * tl.load(row_scale + row, mask=row < rows, other=0.0)[:, None]
        place = row.to(tl.int64)[:, None] * outputs + n[None, :]
        tl.store(out + place, total.to(out.dtype.element_ty), mask=(row < rows)[:, None] & inside[None, :])


@triton.jit
def finish_split(
    partial, scale, row_scale, correction, out, rows, outputs,
    SPLIT: tl.constexpr, SLICES: tl.constexpr, CORRECTED: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Add up the parts of int8_product, one row and BN outputs per program, and scale them."""
    row, n = tl.program_id(1), tl.program_id(0) * BN + tl.arange(0, BN)
    inside, factor = n < outputs, tl.load(scale + n, mask=n < outputs, other=0.0)
    total = tl.zeros((BN,), tl.float32)
    for back in tl.static_range(SLICES):
        sums = tl.zeros((BN,), tl.int32)
        for part in tl.static_range(SPLIT):
            place = ((part * SLICES + SLICES - 1 - back) * rows + row).to(tl.int64) * outputs
            sums += tl.load(partial + place + n, mask=inside, other=0)
        y = sums.to(tl.float32) * factor
        total = y if back == 0 else divide(total, tl.full((BN,), 254.0, tl.float32)) + y
    if CORRECTED:
        total = total - tl.load(correction + n, mask=inside, other=0.0)
    total = total * tl.load(row_scale + row)
    tl.store(out + row.to(tl.int64) * outputs + n, total.to(out.dtype.element_ty), mask=inside)


def multiply_int8(
    q: torch.Tensor,
    row_scale: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    correction: torch.Tensor | None,
    dtype: torch.dtype,
    *,
    split: int | None = None,
) -> torch.Tensor:
    """Return [rows, outputs] as `dtype` of q int8 [slices, rows, K] and weight int8 [outputs, K] with scale [outputs, groups].

    K is a multiple of 32 times the number of groups. `split`: parts of K; None: as many as keep a GPU busy.
    """
    slices, rows, columns = q.shape
    outputs, groups = scale.shape
    assert columns < MOST_COLUMNS, columns
    tile = choose_tile(rows, slices, columns // groups)
    steps = columns // groups // tile["BK"]
    across = divide_up(outputs, tile["BN"]) * divide_up(rows, tile["ROWS"])
    if split is None:
        split = max((part for part in (1, 2, 4, 8) if steps % part == 0 and across * part <= _PROGRAMS + _PROGRAMS // 2), default=1)
    split = split if groups == 1 and steps % split == 0 else 1
    out = torch.empty((rows, outputs), dtype=dtype, device=q.device)
    partial = torch.empty((split, slices, rows, outputs), dtype=torch.int32, device=q.device) if split > 1 else out
    fixed = {"SPLIT": split, "SLICES": slices, "CORRECTED": correction is not None}
    corrections = scale if correction is None else correction
    grid = (divide_up(outputs, tile["BN"]), divide_up(rows, tile["ROWS"]), split)
    launch(
        int8_product, grid, q, weight, scale, row_scale, corrections, out, partial, rows, outputs, K=columns, GROUPS=groups, STEPS=steps,
        **fixed, **tile,
    )  # fmt: skip
    if split > 1:
        block = 256
        launch(
            finish_split, (divide_up(outputs, block), rows), partial, scale, row_scale, corrections, out, rows, outputs, **fixed, BN=block,
            num_warps=2,
        )  # fmt: skip
    return out


def choose_tile(rows: int, slices: int, columns: int) -> dict[str, int]:
    """Choose the tile for a number of rows and slices, and columns per group, a multiple of 32. It never changes a bit."""
    slots = 4 if slices == 3 else slices
    step = max(step for step in (32, 64, 128) if columns % step == 0)
    if rows * slots <= _WIDE_ROWS:
        height = 16 if rows * slots <= 16 else 64
        return {"ROWS": height // slots, "SLOTS": slots, "BN": 64, "BK": step, "num_warps": 4, "num_stages": 4}
    return {"ROWS": 128 // slots, "SLOTS": slots, "BN": 128, "BK": min(step, 64), "num_warps": 8, "num_stages": 3}
