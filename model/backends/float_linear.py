"""Float matmuls of PyTorch on a CPU, in shapes whose results do not depend on the split of the rows or on the number of threads.

Weight rows and activation rows are padded to whole tiles, and the padding is cut off again.
"""

import torch
import torch.nn.functional as F

from parallel.layout import TILE_ROWS

_ROW_TILE = {torch.float32: 8, torch.bfloat16: 16}
"""Activation rows at which PyTorch's CPU matmuls stop depending on the threads and on the batch size."""
_HALF_SINGLE_ROWS = 8
"""float16 on a CPU: up to this many rows, one row at a time is faster than one matmul (measured: 25 against 3-5 GB/s)."""
_HALF_CHUNK_ROWS = 512
"""float16 on a CPU, many rows: weight rows converted to float32 at a time."""


def float_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Multiply x [rows, columns] by weight [tiled rows, columns] on a CPU: bitwise identical for any split of the tiles and any threads."""
    rows = x.shape[0]
    if rows == 1:
        return F.linear(x, weight)
    if x.dtype == torch.float16:
        if rows <= _HALF_SINGLE_ROWS:
            return torch.cat([F.linear(row, weight) for row in torch.split(x, 1)])
        wide = x.float()
        return torch.cat([float_linear(wide, chunk.float()).half() for chunk in torch.split(weight, _HALF_CHUNK_ROWS)], dim=1)
    missing = -rows % _ROW_TILE[x.dtype]
    return F.linear(F.pad(x, (0, 0, 0, missing)), weight)[:rows] if missing else F.linear(x, weight)


def is_split_invariant(dtype: torch.dtype, num_threads: int) -> bool:
    """Return whether this PyTorch on this CPU gives bitwise identical results when the split of the rows or the number of threads changes.

    Checks a small sample of what the tests cover in full, since another CPU or release may break it; a run then prints a warning.
    """
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn((6 * TILE_ROWS, 320), generator=generator).to(dtype)
    threads, kept = torch.get_num_threads(), True
    for rows in (1, 5, 40):
        x = torch.randn((rows, 320), generator=generator).to(dtype)
        torch.set_num_threads(num_threads)
        whole = float_linear(x, weight)
        torch.set_num_threads(1)
        parts = torch.cat([float_linear(x, weight[: 2 * TILE_ROWS].clone()), float_linear(x, weight[2 * TILE_ROWS :].clone())], dim=1)
        kept = kept and torch.equal(whole, parts)
    torch.set_num_threads(threads)
    return kept
