"""Matmuls of int8 weights with activations: integers as they are, or floats decomposed into int8 slices.

    s = max|x| / 127 (per row);  x / s = r0 + r1 / 254 + r2 / 254^2 + ...   each r an integer from -127 to 127
    y = (Q(r0) + Q(r1) / 254 + ...) * s    Q: integer matmul times the weight's scale, summed over the groups of columns

Half types take two slices, whose error is below their own rounding error. float32 takes three, since an outlier in a row of activations
would leave the other elements too few digits (measured against the float matmul, SmolLM2-135M: logits 3e-3 off with two, see
`tests/model/backends/test_int8.py`).

Q accumulates integers, so its result does not depend on the threads, the batch, the ranks or the kernel: all kernels in this file are
bitwise identical.
"""

import functools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from model.kernels.library import Kernels
from parallel.torch_internals import quantize_rows

_EXACT_COLUMNS = 1024
"""128 * 128 * 1024 = 2**24: an integer dot product of this length is exact in float32, in any order."""
_PLAIN_ROWS = 256
"""Weight rows that the plain kernel converts to float at a time."""


@dataclass(frozen=True, slots=True)
class InputSteps:
    """What is done to the inputs of an integer linear before they are multiplied."""

    activation: str | None = None
    """None: slices; "token" or "tensor": rounded to int8 once, with a scale per token or a stored one."""
    divisor: torch.Tensor | None = None
    """float32 [columns]: divisor of the inputs."""
    order: torch.Tensor | None = None
    """int64 [columns]: the input of each column of the weight; None: in order."""
    input_scale: float = 1.0
    """The stored scale."""
    zero_point: int = 0
    """Added to the inputs after the stored scale."""
    correction: torch.Tensor | None = None
    """float32 [rows]: what the zero point adds to the products."""


class WholeLinears(Protocol):
    """Products of whole weights, with all their groups and all that is done to their inputs."""

    def pack(self, weight: torch.Tensor, scale: torch.Tensor, sizes: Sequence[int], bits: int, steps: InputSteps) -> Any:
        """Pack weight int8 [rows, columns] with scale float32 [rows, groups] and the columns of each group, all on the device."""
        ...

    def multiply(self, x: torch.Tensor, packed: Any, dtype: torch.dtype) -> torch.Tensor:
        """Multiply x [tokens, columns] of any float dtype: [tokens, rows] as `dtype`."""
        ...


@dataclass(frozen=True, slots=True)
class Int8Kernel:
    """One implementation of the int8 matmul."""

    name: str
    """Shown in stats."""
    pack: Callable[[torch.Tensor, torch.Tensor], Any]
    """(weight int8 [rows, columns], scale float32 [rows]) to the input of `multiply`."""
    multiply: Callable[[torch.Tensor, Any], torch.Tensor]
    """(integers as float32 [n, columns], packed) to float32 [n, rows]: the integer matmul, rounded, times the scale."""
    whole: Kernels | None = None
    """Set if it multiplies whole weights as stored, with all their groups."""
    linears: WholeLinears | None = None
    """Set if it multiplies whole weights in a form of its own; it then leaves `pack` and `multiply` to tests."""


@dataclass(frozen=True, slots=True)
class Part:
    """Columns [start, stop) of a weight, where each row has one scale."""

    start: int
    """First column."""
    stop: int
    """One past the last column."""
    packed: Any
    """The packed weight."""


def count_slices(dtype: torch.dtype) -> int:
    """Number of 8-bit slices for this dtype."""
    return 3 if dtype == torch.float32 else 2


def sliced_linear(x: torch.Tensor, parts: Sequence[Part], kernel: Int8Kernel, order: torch.Tensor | None = None) -> torch.Tensor:
    """Multiply x [rows, columns] of any float dtype by a packed int8 weight: float32 [rows, weight rows].

    `order`: column permutation of x that matches the parts; None: identity.
    """
    rows, num_slices = x.shape[0], count_slices(x.dtype)
    scale = x.abs().amax(dim=1, keepdim=True).float().div_(127).clamp_min_(1e-30)
    # Slices are computed in place: with small matrices, every extra operator is noticeable.
    slices = torch.empty((num_slices * rows, x.shape[1]), dtype=torch.float32, device=x.device)
    left = x / scale if order is None else x[:, order] / scale
    for first in range(0, num_slices * rows, rows):
        whole = slices[first : first + rows]
        torch.round(left, out=whole)
        left.sub_(whole).mul_(254)
    product = one_slice_linear(slices, parts, kernel)
    total = product[-rows:]
    for first in range((num_slices - 2) * rows, -1, -rows):
        total = total.div_(254).add_(product[first : first + rows])
    return total.mul_(scale)


def token_linear(x: torch.Tensor, parts: Sequence[Part], kernel: Int8Kernel, order: torch.Tensor | None = None) -> torch.Tensor:
    """Multiply x as int8 with a scale per row, for arguments as of `sliced_linear`.

    The scale is that of compressed-tensors: 255 steps from -absmax to absmax, so the largest value is clipped by half a step.
    """
    scale = x.abs().amax(dim=1, keepdim=True).float().div_(127.5).clamp_min_(1e-30)
    integers = (x.float() / scale).round_().clamp_(-128, 127)
    return one_slice_linear(integers if order is None else integers[:, order], parts, kernel).mul_(scale)


def one_slice_linear(integers: torch.Tensor, parts: Sequence[Part], kernel: Int8Kernel) -> torch.Tensor:
    """Multiply integers from -128 to 127 as float32 [rows, columns] by all parts of a weight: float32 [rows, weight rows]."""
    product: torch.Tensor | None = None
    for part in parts:
        inside = integers if len(parts) == 1 else integers[:, part.start : part.stop].contiguous()
        one = kernel.multiply(inside, part.packed)
        product = one if product is None else product.add_(one)
    assert product is not None
    return product


def _pack_plain(weight: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return weight, scale


def _multiply_plain(slices: torch.Tensor, packed: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    weight, scale = packed
    out = torch.empty((slices.shape[0], weight.shape[0]), dtype=torch.float32, device=slices.device)
    for first in range(0, weight.shape[0], _PLAIN_ROWS):
        rows = weight[first : first + _PLAIN_ROWS]
        total = torch.zeros((slices.shape[0], rows.shape[0]), dtype=torch.float64, device=slices.device)
        for column in range(0, weight.shape[1], _EXACT_COLUMNS):
            part = slice(column, column + _EXACT_COLUMNS)
            total += F.linear(slices[:, part], rows[:, part].float())
        out[:, first : first + _PLAIN_ROWS] = total.float()
    return out.mul_(scale)


def _pack_fbgemm(weight: torch.Tensor, scale: torch.Tensor) -> Any:
    with warnings.catch_warnings():
        # PyTorch is deprecating quantized tensors in eager mode, but not the operators underneath.
        warnings.simplefilter("ignore")
        return torch.ops.quantized.linear_prepack(quantize_rows(weight, scale), None)


def _multiply_fbgemm(slices: torch.Tensor, packed: Any) -> torch.Tensor:
    product: torch.Tensor = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(slices, 1.0, 128, packed)
    return product


PLAIN = Int8Kernel("int8-plain", _pack_plain, _multiply_plain)
FBGEMM = Int8Kernel("int8-sliced-fbgemm", _pack_fbgemm, _multiply_fbgemm)


@functools.cache
def build_native_kernel(kernels: Kernels) -> Int8Kernel:
    """Build the native kernel, which uses weights as stored."""

    def multiply(integers: torch.Tensor, packed: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        weight, scale = packed
        starts = torch.tensor([0, weight.shape[1]])
        return kernels.int8_linear(integers.to(torch.int8), weight, scale, starts, 0, torch.float32)

    return Int8Kernel(kernels.int8_name, _pack_plain, multiply, kernels)


@functools.cache
def choose_cpu_kernel() -> Int8Kernel:
    """Return the fastest of PyTorch's kernels that is exact on this CPU; PLAIN always is."""
    if "x86" in torch.backends.quantized.supported_engines:
        torch.backends.quantized.engine = "x86"
        if _is_exact(FBGEMM):
            return FBGEMM
    return PLAIN


def _is_exact(kernel: Int8Kernel) -> bool:
    """Check with extreme values, which expose CPUs whose 8-bit multiply-add saturates (x86 without VNNI)."""
    values = torch.tensor([127.0, -127.0]).repeat_interleave(64)
    weight = torch.tensor([[127], [-128]], dtype=torch.int8).expand(2, 128).contiguous()
    slices = torch.stack((values, values.flip(0), values.abs(), -values.abs()))
    scale = torch.tensor([0.5, 3.0])
    try:
        product = kernel.multiply(slices, kernel.pack(weight, scale))
    except RuntimeError:  # an engine that this CPU does not support
        return False
    return torch.equal(product, _multiply_plain(slices, (weight, scale)))
