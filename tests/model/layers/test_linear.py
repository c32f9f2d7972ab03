"""The facts about products that everything rests on: the bits do not depend on the split, the threads or the rows beside."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from model.backends.float_linear import float_linear
from model.backends.registry import find_backend
from model.layers.linear import ColumnParallelLinear, RowBlock, VocabParallelEmbedding, tile_rows
from parallel.layout import Rows

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROWS = tuple(range(1, 34))
SHAPES = ((144, 577), (1056, 64))  # weight rows, all multiples of 16, and columns


def make(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_split_at_tiles_and_another_number_of_threads_change_no_bit(
    shape: tuple[int, int], dtype: torch.dtype, keep_torch_threads: None
) -> None:
    weight = make(shape, dtype)
    inputs = {rows: make((rows, shape[1]), dtype, rows) for rows in ROWS}
    torch.set_num_threads(1)
    whole = {rows: float_linear(x, weight) for rows, x in inputs.items()}
    for threads, cut in itertools.product((1, 2), ([], [16], [16, shape[0] // 32 * 16])):
        torch.set_num_threads(threads)
        parts = [weight[start:stop].clone() for start, stop in itertools.pairwise([0, *cut, shape[0]])]
        for rows, x in inputs.items():
            found = torch.cat([float_linear(x, part) for part in parts], dim=1)
            assert found.dtype == dtype and torch.equal(found, whole[rows]), (rows, threads, cut)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_product_is_near_the_one_in_float64(dtype: torch.dtype) -> None:
    weight = make((144, 576), dtype)
    for rows in ROWS:
        x = make((rows, 576), dtype, rows)
        expected = x.double() @ weight.double().T
        error = (float_linear(x, weight).double() - expected).norm() / expected.norm()
        assert error < {torch.float32: 1e-6, torch.bfloat16: 3e-3, torch.float16: 4e-4}[dtype], rows


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_does_not_depend_on_the_rows_beside_it(dtype: torch.dtype) -> None:
    weight = make((144, 576), dtype)
    for rows in (2, 5, 8, 9, 17, 33):
        x = make((rows, 576), dtype, rows)
        whole = float_linear(x, weight)
        assert torch.equal(float_linear(x.flip(0), weight), whole.flip(0)), rows
        others = make((rows, 576), dtype, 99)
        others[rows // 2] = x[rows // 2]
        assert torch.equal(float_linear(others, weight)[rows // 2], whole[rows // 2]), rows


def test_units_that_are_no_tiles_are_filled_up_one_by_one() -> None:
    total, index = tile_rows([RowBlock(num_rows=25, unit=10), RowBlock(num_rows=16, unit=16)])
    assert total == 16 + 16 + 16 + 16
    assert index is not None
    assert index.tolist() == [*range(10), *range(16, 26), *range(32, 37), *range(48, 64)]


def test_units_that_are_tiles_are_left_as_they_are() -> None:
    assert tile_rows([RowBlock(num_rows=48, unit=16), RowBlock(num_rows=64, unit=32)]) == (112, None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_rows", "unit"), [(97, 10), (12, 1), (172, 16), (64, 8), (90, 16), (40, 24)])
def test_every_number_of_ranks_gives_the_bits_of_one(num_rows: int, unit: int, dtype: torch.dtype) -> None:
    weights, columns = [make((num_rows, 72), dtype, seed) for seed in (1, 2)], 72

    def build(rank: int, world_size: int) -> ColumnParallelLinear:
        start, stop = Rows(unit).interval(num_rows, rank, world_size)
        layer = ColumnParallelLinear(columns, [RowBlock(stop - start, unit)] * 2, dtype, find_backend("cpu"))
        layer.assign(torch.cat([weight[start:stop] for weight in weights]), CPU)
        return layer

    for rows in (1, 3, 8, 20):
        x = make((rows, columns), dtype, rows)
        whole = build(0, 1)(x)
        torch.testing.assert_close(whole, F.linear(x, torch.cat(weights)), rtol=2e-2, atol=2e-2)
        for world_size in range(2, min(Rows(unit).num_units(num_rows), 7) + 1):
            parts = [build(rank, world_size)(x).chunk(2, dim=1) for rank in range(world_size)]
            joined = torch.cat([part[0] for part in parts] + [part[1] for part in parts], dim=1)
            assert torch.equal(joined, whole), (rows, world_size)


@pytest.mark.parametrize("unit", [10, 16])
def test_the_embedding_gives_the_rows_of_the_ids_that_it_owns(unit: int) -> None:
    weight = make((97, 24), torch.bfloat16)
    ids = torch.tensor([96, 0, 5, 40, 41, 5, 63])
    for world_size in (1, 2, 3, 5):
        owners = torch.zeros(len(ids), dtype=torch.long)
        for rank in range(world_size):
            start, stop = Rows(unit).interval(97, rank, world_size)
            layer = VocabParallelEmbedding(24, start, RowBlock(stop - start, unit), torch.bfloat16, find_backend("cpu"))
            layer.assign(weight[start:stop], CPU)
            found, owned = layer(ids), (ids >= start) & (ids < stop)
            assert found.shape == (len(ids), 24) and ids[0] == 96
            assert torch.equal(found[owned], weight[ids[owned]])
            owners += owned
        assert owners.tolist() == [1] * len(ids)
