"""Arithmetic that rounds as on the CPU."""

import triton
import triton.language as tl


@triton.jit
def round_even(x):
    """Round |x| < 2^22 to the nearest integer, halves to even: beyond 1.5 * 2^23, float32 has no fractions."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def divide(x, y):
    """x / y of float32, rounded once; Triton's own / is an approximation on GPUs."""
    return tl.math.div_rn(x, y)
