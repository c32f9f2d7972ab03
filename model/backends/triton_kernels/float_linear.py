"""The product of floats: one program walks all of K in one order, so a result depends on its row and its weight row only."""

import torch
import triton
import triton.language as tl

from model.backends.triton_kernels.launching import divide_up, launch

_STEP = 64
"""Columns at a time. Part of the result's bits, so the same for every number of rows."""


@triton.jit
def float_product(
    x, weight, out, rows, outputs, columns: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr
):
    """out [rows, outputs] of x [rows, columns] by weight [outputs, columns], summed in float32. EVEN: BK divides the columns."""
    n, m = tl.program_id(0) * BN + tl.arange(0, BN), tl.program_id(1) * BM + tl.arange(0, BM)
    k = tl.arange(0, BK)
    present, inside = (m < rows)[:, None], (n < outputs)[None, :]
    x_place = x + m.to(tl.int64)[:, None] * columns + k[None, :]
    w_place = weight + n.to(tl.int64)[None, :] * columns + k[:, None]
    sums = tl.zeros((BM, BN), dtype=tl.float32)
    for first in range(0, columns, BK):
        left = present if EVEN else present & (first + k < columns)[None, :]
        right = inside if EVEN else inside & (first + k < columns)[:, None]
        sums = tl.dot(
            tl.load(x_place + first, mask=left, other=0.0),
            tl.load(w_place + first, mask=right, other=0.0),
            acc=sums,
            input_precision="ieee",
        )
    tl.store(out + m.to(tl.int64)[:, None] * outputs + n[None, :], sums.to(out.dtype.element_ty), mask=present & inside)


def multiply_floats(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return x [rows, columns] by weight [outputs, columns] of the same dtype: [rows, outputs]."""
    x, (rows, columns), outputs = x.contiguous(), x.shape, weight.shape[0]
    out = torch.empty((rows, outputs), dtype=x.dtype, device=x.device)
    tile = choose_float_tile(rows, x.dtype)
    grid = (divide_up(outputs, tile["BN"]), divide_up(rows, tile["BM"]))
    launch(float_product, grid, x, weight, out, rows, outputs, columns, BK=_STEP, EVEN=columns % _STEP == 0, **tile)
    return out


def choose_float_tile(rows: int, dtype: torch.dtype) -> dict[str, int]:
    """Choose the tile by the number of rows.

    Never 64 rows or more with four warps: that is where Hopper GPUs switch to another instruction, which may round sums differently.
    """
    if rows <= 16 or dtype == torch.float32:
        return {"BM": 16, "BN": 32, "num_warps": 4, "num_stages": 4}
    return {"BM": 32, "BN": 128, "num_warps": 4, "num_stages": 3}
