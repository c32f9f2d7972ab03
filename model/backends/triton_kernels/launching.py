"""The one place where kernels are launched, so that launches can be counted."""

from typing import Any

import triton

IEEE = {"enable_fp_fusion": False}
"""Launch option without which a product and a sum become one instruction, rounded once, to other bits than the CPU's."""


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Launch `kernel` on a grid of programs; a grid without programs is left out. Options are constants and Triton's launch options."""
    if all(grid):
        kernel[grid](*args, **options, **IEEE)


def cover(size: int) -> int:
    """Return the smallest power of two that is at least `size`: the length of a range in a kernel."""
    return int(triton.next_power_of_2(size))


def divide_up(size: int, step: int) -> int:
    """Return the number of steps that cover `size`."""
    return -(-size // step)
