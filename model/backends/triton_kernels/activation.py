"""Gated activations, element by element."""

import torch
import triton
import triton.language as tl

from model.backends.triton_kernels.arithmetic import divide
from model.backends.triton_kernels.launching import divide_up, launch

_BLOCK = 1024


@triton.jit
def silu_product(gate_up, out, size, BLOCK: tl.constexpr):
    """out [rows, size] = silu of the first half of each row of gate_up [rows, 2 size] times the second half."""
    row, c = tl.program_id(1).to(tl.int64), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_up + row * 2 * size + c, mask=c < size, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * size + size + c, mask=c < size, other=0.0).to(tl.float32)
    value = divide(gate, tl.exp(-gate) + 1.0) * up
    tl.store(out + row * size + c, value.to(out.dtype.element_ty), mask=c < size)


def multiply_silu(gate_up: torch.Tensor) -> torch.Tensor:
    """[rows, 2 size] to [rows, size]."""
    gate_up, (rows, width) = gate_up.contiguous(), gate_up.shape
    out = torch.empty((rows, width // 2), dtype=gate_up.dtype, device=gate_up.device)
    launch(silu_product, (divide_up(width // 2, _BLOCK), rows), gate_up, out, width // 2, BLOCK=_BLOCK, num_warps=4)
    return out
