"""RMSNorm with the addition before it and the slices of an integer linear after it, one row per program."""

import torch
import triton
import triton.language as tl

from model.backends.triton_kernels.arithmetic import divide, round_even
from model.backends.triton_kernels.launching import cover, launch


@triton.jit
def add_and_normalize(
    hidden, delta, weight, out, q, row_scale, rows, size, inverse_size, eps, ADDED: tl.constexpr, SLICES: tl.constexpr, BLOCK: tl.constexpr
):
    """hidden [rows, size] += delta if ADDED; out = hidden / sqrt(mean(hidden^2) + eps), rounded to hidden's dtype, times weight.

    With SLICES, also q int8 [SLICES, rows, size] and row_scale float32 [rows] of out, as slice_rows makes them.
    """
    row, c = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = c < size
    value = tl.load(hidden + row * size + c, mask=inside, other=0.0)
    if ADDED:
        more = tl.load(delta + row * size + c, mask=inside, other=0.0)
        value = (value.to(tl.float32) + more.to(tl.float32)).to(hidden.dtype.element_ty)
        tl.store(hidden + row * size + c, value, mask=inside)
    wide = value.to(tl.float32)
    root = tl.math.sqrt_rn(tl.sum(wide * wide, axis=0) * inverse_size + eps)
    normed = divide(wide, root + tl.zeros((BLOCK,), tl.float32)).to(hidden.dtype.element_ty).to(tl.float32)
    factor = tl.load(weight + c, mask=inside, other=0.0).to(tl.float32)
    result = (normed * factor).to(out.dtype.element_ty)
    tl.store(out + row * size + c, result, mask=inside)
    if SLICES > 0:
        left = result.to(tl.float32)
        top = tl.max(tl.abs(left), axis=0)
        bad = tl.maximum(tl.max(tl.where(left != left, 1, 0), axis=0), tl.where(top == float("inf"), 1, 0))
        scale = tl.maximum(divide(top, 127.0), 1e-30)
        tl.store(row_scale + row, tl.where(bad > 0, float("nan"), scale))
        left = divide(left, scale + tl.zeros((BLOCK,), tl.float32))
        left = tl.where(left != left, 0.0, tl.minimum(tl.maximum(left, -1024.0), 1024.0))
        for one in tl.static_range(SLICES):
            whole = round_even(left)
            tl.store(q + (one * rows + row) * size + c, whole.to(tl.int32).to(tl.int8), mask=inside)
            left = (left - whole) * 254.0


def normalize(
    hidden: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float, slices: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """RMSNorm of contiguous hidden [rows, size], to which `delta` is added in place first.

    Also returns what `make_slices` does of the result, if `slices` is not 0.
    """
    rows, size = hidden.shape
    out = torch.empty_like(hidden)
    added = hidden if delta is None else delta.contiguous()
    q = torch.empty((slices, rows, size), dtype=torch.int8, device=hidden.device) if slices else out
    row_scale = torch.empty(rows, dtype=torch.float32, device=hidden.device) if slices else out
    launch(
        add_and_normalize, (rows,), hidden, added, weight, out, q, row_scale, rows, size, 1.0 / size, float(eps), ADDED=delta is not None,
        SLICES=slices, BLOCK=cover(size), num_warps=8 if size > 1024 else 4,
    )  # fmt: skip
    return out, q, row_scale
