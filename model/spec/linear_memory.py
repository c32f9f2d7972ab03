"""Bytes of a quantized linear in memory, without tensors."""

from model.spec.linear_scheme import LinearScheme

TILE_ROWS, STEP_COLUMNS, STEP_BYTES = 16, 8, 64
"""Packed 4-bit weights, as in model/kernels/int4_linear.c."""


def count_linear_bytes(rows: int, columns: int, scheme: LinearScheme, *, own_kernels: bool) -> int:
    """Return the bytes of integers, scales and zero points of `rows` rows.

    Native kernels keep 4-bit weights packed: half a byte an element, a float32 scale and a byte for the zero point of each row and group,
    in tiles of 16 rows. Else an element takes a byte, and a row and group a float32 scale.
    """
    groups = scheme.num_groups(columns)
    if scheme.bits != 4 or not own_kernels:
        return rows * (columns + 4 * groups)
    size = columns if scheme.group_size is None else scheme.group_size
    steps = sum(-(-min(size, columns - first) // STEP_COLUMNS) for first in range(0, columns, size))
    return -(-rows // TILE_ROWS) * (steps * STEP_BYTES + groups * TILE_ROWS * 5)
