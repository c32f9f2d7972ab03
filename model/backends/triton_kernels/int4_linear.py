"""The integer product of slices and a weight of 4 bits, which stays packed in memory: one integer sum per group, scaled in order."""

import torch
import triton
import triton.language as tl

from model.backends.triton_kernels.int8_linear import choose_tile, join_slices
from model.backends.triton_kernels.launching import divide_up, launch


@triton.jit
def int4_product(
    q, packed, zeros, scale, row_scale, out, rows, outputs,
    K: tl.constexpr, GROUPS: tl.constexpr, STEPS: tl.constexpr, SLICES: tl.constexpr,
    ROWS: tl.constexpr, SLOTS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out [rows, outputs] of q int8 [SLICES, rows, K] by packed uint8 [outputs, K / 2] with zeros int8 and scale [outputs, GROUPS].

    Groups of STEPS * BK columns come in pairs: a byte holds a column of the first group in its low half, and the same column of the second
    group in its high half. A weight is that half plus its group's zero.
    """
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    tile = tl.arange(0, SLOTS * ROWS)
    one, m = tile // ROWS, tl.program_id(1) * ROWS + tile % ROWS
    present, inside = (one < SLICES) & (m < rows), n < outputs
    k = tl.arange(0, BK)
    x_place = q + (one * rows + m).to(tl.int64)[:, None] * K + k[None, :]
    w_place = packed + n.to(tl.int64)[None, :] * (K // 2) + k[:, None]
    y = tl.zeros((SLOTS * ROWS, BN), dtype=tl.float32)
    for pair in range(GROUPS // 2):
        low = tl.zeros((SLOTS * ROWS, BN), dtype=tl.int32)
        high = tl.zeros((SLOTS * ROWS, BN), dtype=tl.int32)
        low_zero = tl.load(zeros + n * GROUPS + 2 * pair, mask=inside, other=0)[None, :]
        high_zero = tl.load(zeros + n * GROUPS + 2 * pair + 1, mask=inside, other=0)[None, :]
        for step in range(STEPS):
            both = tl.load(w_place + (pair * STEPS + step) * BK, mask=inside[None, :], other=0)
            x = tl.load(x_place + (2 * pair * STEPS + step) * BK, mask=present[:, None], other=0)
            low = tl.dot(x, (both & 15).to(tl.int8) + low_zero, acc=low, out_dtype=tl.int32)
            x = tl.load(x_place + ((2 * pair + 1) * STEPS + step) * BK, mask=present[:, None], other=0)
            high = tl.dot(x, (both >> 4).to(tl.int8) + high_zero, acc=high, out_dtype=tl.int32)
        y += low.to(tl.float32) * tl.load(scale + n * GROUPS + 2 * pair, mask=inside, other=0.0)[None, :]
        y += high.to(tl.float32) * tl.load(scale + n * GROUPS + 2 * pair + 1, mask=inside, other=0.0)[None, :]
    total = join_slices(y, ROWS, SLOTS, SLICES, BN)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    total = total * tl.load(row_scale + row, mask=row < rows, other=0.0)[:, None]
    place = row.to(tl.int64)[:, None] * outputs + n[None, :]
    tl.store(out + place, total.to(out.dtype.element_ty), mask=(row < rows)[:, None] & inside[None, :])


def pack_halves(weight: torch.Tensor, groups: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Pack int8 [outputs, K] of an even number of equal groups: uint8 [outputs, K / 2] and zeros int8 [outputs, groups].

    None if the integers of a row and group span over 4 bits.
    """
    outputs, columns = weight.shape
    split = weight.view(outputs, groups, columns // groups)
    zeros = split.amin(dim=2)
    # int8 differences may leave int8.
    if bool((split.amax(dim=2).to(torch.int16) - zeros.to(torch.int16) > 15).any()):
        return None
    halves = (split - zeros[:, :, None]).to(torch.uint8).view(outputs, groups // 2, 2, -1)
    return (halves[:, :, 0] | (halves[:, :, 1] << 4)).reshape(outputs, columns // 2).contiguous(), zeros.contiguous()


def multiply_int4(
    q: torch.Tensor, row_scale: torch.Tensor, packed: torch.Tensor, zeros: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Return [rows, outputs] as `dtype` of q int8 [slices, rows, K] and what `pack_halves` returns, with scale [outputs, groups]."""
    slices, rows, columns = q.shape
    outputs, groups = scale.shape
    tile = choose_tile(rows, slices, columns // groups)
    out = torch.empty((rows, outputs), dtype=dtype, device=q.device)
    launch(
        int4_product, (divide_up(outputs, tile["BN"]), divide_up(rows, tile["ROWS"])), q, packed, zeros, scale, row_scale, out, rows,
        outputs, K=columns, GROUPS=groups, STEPS=columns // groups // tile["BK"], SLICES=slices, **tile,
    )  # fmt: skip
    return out
