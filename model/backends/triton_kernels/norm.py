"""RMSNorm with the addition before it, one row per program."""

import torch
import triton
import triton.language as tl

from model.backends.triton_kernels.arithmetic import divide
from model.backends.triton_kernels.launching import cover, launch


@triton.jit
def add_and_normalize(hidden, delta, weight, out, size, inverse_size, eps, ADDED: tl.constexpr, BLOCK: tl.constexpr):
    """hidden [rows, size] += delta if ADDED; out = hidden / sqrt(mean(hidden^2) + eps), rounded to hidden's dtype, times weight."""
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
    tl.store(out + row * size + c, (normed * factor).to(out.dtype.element_ty), mask=inside)


def normalize(hidden: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm of contiguous hidden [rows, size], to which `delta` is added in place first."""
    rows, size = hidden.shape
    out = torch.empty_like(hidden)
    added = hidden if delta is None else delta.contiguous()
    launch(
        add_and_normalize, (rows,), hidden, added, weight, out, size, 1.0 / size, float(eps), ADDED=delta is not None, BLOCK=cover(size),
        num_warps=8 if size > 1024 else 4,
    )  # fmt: skip
    return out
