"""Activations as int8 slices, as `model/backends/int8.py` makes them, bit for bit."""

import torch
import triton
import triton.language as tl

from model.backends.triton_kernels.arithmetic import divide, round_even
from model.backends.triton_kernels.launching import cover, divide_up, launch

_BLOCK = 4096
"""Columns at a time."""
SLICED, BY_TOKEN, BY_TENSOR = 0, 1, 2
"""Ways to make integers: slices, one scale per token, one stored scale."""


@triton.jit
def slice_rows(
    x, divisor, index, q, row_scale, rows, columns, input_scale, zero_point,
    PADDED: tl.constexpr, WAY: tl.constexpr, SLICES: tl.constexpr, DIVIDED: tl.constexpr, INDEXED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per row: q int8 [SLICES, rows, PADDED] and row_scale float32 [rows] from x [rows, columns].

    INDEXED: column c of q comes from column index[c] of x; -1: zero. DIVIDED: x is divided by divisor [columns of x] first.
    """
    row = tl.program_id(0).to(tl.int64)
    top, bad = 0.0, 0
    for first in range(0, PADDED, BLOCK):
        c = first + tl.arange(0, BLOCK)
        source = tl.load(index + c, mask=c < PADDED, other=-1) if INDEXED else c
        inside = (source >= 0) & (source < columns)
        value = tl.load(x + row * columns + source, mask=inside, other=0.0).to(tl.float32)
        if DIVIDED:
            value = divide(value, tl.load(divisor + source, mask=inside, other=1.0))
        top = tl.maximum(top, tl.max(tl.abs(value), axis=0))
        bad = tl.maximum(bad, tl.max(tl.where(value != value, 1, 0), axis=0))
    if WAY == 2:
        scale, result = input_scale, input_scale
    else:
        # No integer represents NaN or infinity: the row's scale does, so that the whole row's results are NaN.
        bad = tl.maximum(bad, tl.where(top == float("inf"), 1, 0))
        scale = tl.maximum(divide(top, 127.0 if WAY == 0 else 127.5), 1e-30)
        result = scale
    tl.store(row_scale + row, tl.where(bad > 0, float("nan"), result))
    for first in range(0, PADDED, BLOCK):
        c = first + tl.arange(0, BLOCK)
        source = tl.load(index + c, mask=c < PADDED, other=-1) if INDEXED else c
        inside = (source >= 0) & (source < columns)
        value = tl.load(x + row * columns + source, mask=inside, other=0.0).to(tl.float32)
        if WAY == 2:
            factor = tl.load(divisor + source, mask=inside, other=1.0) * scale if DIVIDED else scale + tl.zeros((BLOCK,), tl.float32)
            left = divide(value, factor) + zero_point
        else:
            if DIVIDED:
                value = divide(value, tl.load(divisor + source, mask=inside, other=1.0))
            left = divide(value, scale + tl.zeros((BLOCK,), tl.float32))
        # NaN and infinity would be undefined as integers; their rows' scales are NaN where it matters.
        left = tl.where(left != left, 0.0, tl.minimum(tl.maximum(left, -1024.0), 1024.0))
        for one in tl.static_range(SLICES):
            whole = round_even(left)
            if WAY != 0:
                whole = tl.minimum(tl.maximum(whole, -128.0), 127.0)
            stored = tl.where(inside, whole, 0.0).to(tl.int32).to(tl.int8)
            tl.store(q + (one * rows + row) * PADDED + c, stored, mask=c < PADDED)
            left = (left - whole) * 254.0


def make_slices(
    x: torch.Tensor,
    padded: int,
    way: int,
    slices: int,
    divisor: torch.Tensor | None,
    index: torch.Tensor | None,
    input_scale: float,
    zero_point: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return int8 [slices, rows, padded] and the scale of each row, float32 [rows], of contiguous x [rows, columns]."""
    rows, columns = x.shape
    q = torch.empty((slices, rows, padded), dtype=torch.int8, device=x.device)
    scale = torch.empty(rows, dtype=torch.float32, device=x.device)
    block = min(_BLOCK, cover(padded))
    launch(
        slice_rows, (rows,), x, x if divisor is None else divisor, x if index is None else index, q, scale, rows, columns,
        float(input_scale), float(zero_point), PADDED=padded, WAY=way, SLICES=slices, DIVIDED=divisor is not None,
        INDEXED=index is not None, BLOCK=block, num_warps=8 if block > 1024 else 4,
    )  # fmt: skip
    return q, scale


def pad_columns(columns: int, step: int) -> int:
    """Return the number of columns, padded to whole steps."""
    return divide_up(columns, step) * step
