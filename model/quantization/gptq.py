"""GPTQ: round a weight column by column, and propagate each column's error to the remaining columns.

arXiv 2210.17323, in the Cholesky form of its section 3.3: with H = X^T X of the inputs X (each token of length 1) and U the upper
Cholesky factor of H^-1, the error e of column i changes column j > i by -e * U[i, j] / U[i, i]. Rows are independent, so a rank can
round its own rows.
"""

import torch

from model.backends.float_linear import float_linear
from model.layers.rounding import choose_group_scales, round_to_integers

_BLOCK_COLUMNS = 128
"""Columns per block; the errors of a block are propagated to later columns in one matmul."""
DAMPING = 0.01
"""Fraction of H's mean diagonal that is added to the diagonal."""


def invert_hessian(hessian: torch.Tensor, damping: float = DAMPING) -> torch.Tensor:
    """Return the upper Cholesky factor of H^-1, float32 [columns, columns], given H (which is overwritten).

    A channel that was never active gets diagonal 1. The damping is increased until H is positive definite.
    """
    diagonal = torch.diagonal(hessian)
    diagonal[diagonal == 0] = 1
    step = float(diagonal.mean()) * damping
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # LAPACK's low-order bits depend on the number of threads
    try:
        for _ in range(8):
            diagonal += step
            lower, failed = torch.linalg.cholesky_ex(hessian)
            if not failed:
                inverse = torch.cholesky_inverse(lower)
                del lower
                upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
                if not failed:
                    return torch.as_tensor(upper)
            step *= 4
    finally:
        torch.set_num_threads(threads)
    raise ValueError("the inputs of a linear are not finite: its Hessian has no Cholesky factor")


def quantize_gptq(
    weight: torch.Tensor, upper: torch.Tensor, bits: int, group_size: int, *, symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Quantize weight [rows, columns] to int8 [rows, columns], scale [rows, groups], zero points int8 [rows, groups] or None.

    `upper`: result of `invert_hessian`. `group_size` divides the columns. Scales have the weight's dtype.
    """
    left, columns = weight.float(), weight.shape[1]
    if left is weight:
        left = weight.clone()
    integers = torch.empty(weight.shape, dtype=torch.int8)
    scales = torch.empty((weight.shape[0], columns // group_size), dtype=weight.dtype)
    zero_points = None if symmetric else torch.empty(scales.shape, dtype=torch.int8)
    block_columns = max(group_size, _BLOCK_COLUMNS // group_size * group_size)
    for start in range(0, columns, block_columns):
        stop = min(start + block_columns, columns)
        errors = torch.empty((weight.shape[0], stop - start))
        for column in range(start, stop):
            group, first = divmod(column, group_size)
            if first == 0:
                scale, zero_point = choose_group_scales(left[:, column : column + group_size].to(weight.dtype), bits, symmetric=symmetric)
                scales[:, group] = scale
                zero = torch.zeros(()) if zero_point is None else zero_point.float()
                if zero_points is not None and zero_point is not None:
                    zero_points[:, group] = zero_point
            wide = scale.float()
            rounded = round_to_integers(left[:, column] / wide + zero, bits)
            integers[:, column] = rounded
            error = (left[:, column] - (rounded.float() - zero) * wide) / upper[column, column]
            left[:, column:stop].addcmul_(error.unsqueeze(1), upper[column, column:stop].unsqueeze(0), value=-1)
            errors[:, column - start] = error
        if stop < columns:
            left[:, stop:] -= float_linear(errors, upper[start:stop, stop:].T.contiguous())
    return integers, scales, zero_points
