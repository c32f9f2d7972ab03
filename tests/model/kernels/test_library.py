"""The project's own kernels, product by product: exact integers, float64, and the same bits for any rows, split and threads.

Attention has `test_native_attention.py`, whole layers have `test_fused_layers.py`.
"""

import ctypes
import itertools
import mmap
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F

from model.backends.int8 import PLAIN, Part, count_slices, one_slice_linear, sliced_linear
from model.kernels.library import _MAX_COLUMNS, Kernels, find_kernels, kernels_disabled

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
COLUMNS = (1, 5, 63, 64, 65, 200, 2048)
GROUPS = ("one", "128", "32", "uneven")
THREADS = (1, 2, 3)
ROUNDING = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
"""Twice the relative error of one rounding."""


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    found = find_kernels()
    if found is None:
        pytest.skip("no kernels: the package was built without them, or this processor has neither AVX2 nor NEON with dot products")
    return found


def find_starts(columns: int, groups: str) -> torch.Tensor:
    """First columns of the groups, and the end."""
    if groups == "one":
        return torch.tensor([0, columns])
    if groups == "uneven":
        return torch.tensor([*(start for start in (0, 1, 3, 64, 70, 199, 263, 1000) if start < columns), columns])
    return torch.tensor([*range(0, columns, int(groups)), columns])


def make_weight(rows: int, columns: int, starts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(int8 [rows, columns], scale float32 [rows, groups])."""
    generator = torch.Generator().manual_seed(rows * 10000 + columns)
    weight = torch.randint(-128, 128, (rows, columns), generator=generator, dtype=torch.int8)
    weight[0], weight[-1, ::2] = -128, 127
    return weight, torch.rand((rows, len(starts) - 1), generator=generator) / 100 + 1e-5


def make_inputs(tokens: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows with an outlier of 300; of five and more, one is zeros, one tiny, one denormal, one has the type's largest, one is all alike."""
    x = torch.randn((tokens, columns), generator=torch.Generator().manual_seed(tokens * 10000 + columns))
    x[:, columns // 2] *= 300
    x = x.to(dtype)
    if tokens >= 5:
        x[0], x[1], x[2] = 0, x[1] * 1e-25, x[2] * (torch.finfo(dtype).tiny / 64)
        x[3, -1] = torch.finfo(dtype).max
        x[4] = -1e-3
    return x


def multiply_plainly(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    parts = find_parts(weight, scale, starts)
    return sliced_linear(x, parts, PLAIN).to(x.dtype)


def find_parts(weight: torch.Tensor, scale: torch.Tensor, starts: torch.Tensor) -> list[Part]:
    spans = enumerate(itertools.pairwise(starts.tolist()))
    return [Part(a, b, PLAIN.pack(weight[:, a:b].contiguous(), scale[:, group].contiguous())) for group, (a, b) in spans]


def multiply(kernels: Kernels, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    return kernels.int8_linear(x, weight, scale, starts, count_slices(x.dtype), x.dtype)


def place_at_the_end(tensor: torch.Tensor) -> torch.Tensor:
    """A copy whose last byte is the last one that may be read: behind it lies a page without rights."""
    whole = -(-tensor.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, whole + mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(address + whole), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    placed = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=whole - tensor.nbytes).view(tensor.shape)
    return placed.copy_(tensor)


def test_kernels_can_be_disabled_and_nested(kernels: Kernels) -> None:
    with kernels_disabled():
        assert find_kernels() is None
        with kernels_disabled():
            pass
        assert find_kernels() is None
    assert find_kernels() is kernels


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("columns", COLUMNS)
def test_an_int8_product_has_the_bits_of_the_plain_kernel(kernels: Kernels, columns: int, groups: str, dtype: torch.dtype) -> None:
    starts = find_starts(columns, groups)
    for rows in range(1, 18):
        weight, scale = make_weight(rows, columns, starts)
        for tokens in {1, 2, 3, rows % 7 + 4, 2 * rows + 6} if columns < 2048 else {1, 7, 2 * rows + 6}:
            x = make_inputs(tokens, columns, dtype)
            found = multiply(kernels, x, weight, scale, starts)
            assert found.dtype == dtype and torch.equal(found, multiply_plainly(x, weight, scale, starts)), (rows, tokens)


@pytest.mark.parametrize("columns", [*COLUMNS, _MAX_COLUMNS])
@pytest.mark.parametrize("value", [-128, 127])
def test_products_of_extremes_do_not_saturate_or_overflow(kernels: Kernels, value: int, columns: int) -> None:
    starts, scale = torch.tensor([0, columns]), torch.tensor([1.0, 0.1, 1e-8])[:, None]
    weight = torch.full((3, columns), value, dtype=torch.int8)
    weight[1, 0] += 1 if value < 0 else -1
    for other in (-128, -127, 127):
        integers = torch.full((2, columns), other, dtype=torch.int8)
        integers[1, 1::2] = -other - 1
        expected = (integers.long() @ weight.long().T).float() * scale.T
        assert torch.equal(kernels.int8_linear(integers, weight, scale, starts, 0, torch.float32), expected)
        x = integers.float() / 16
        assert torch.equal(multiply(kernels, x, weight, scale, starts), multiply_plainly(x, weight, scale, starts))


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("columns", COLUMNS)
def test_integer_inputs_are_multiplied_as_they_are(kernels: Kernels, columns: int, groups: str) -> None:
    starts = find_starts(columns, groups)
    for rows, tokens in ((1, 1), (4, 3), (5, 6), (17, 40)):
        weight, scale = make_weight(rows, columns, starts)
        integers = torch.randint(-128, 128, (tokens, columns), generator=torch.Generator().manual_seed(tokens), dtype=torch.int8)
        expected = one_slice_linear(integers.float(), find_parts(weight, scale, starts), PLAIN)
        for dtype in DTYPES:
            assert torch.equal(kernels.int8_linear(integers, weight, scale, starts, 0, dtype), expected.to(dtype)), (rows, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_row_that_is_not_finite_gives_nan_and_leaves_the_others_alone(kernels: Kernels, value: float, dtype: torch.dtype) -> None:
    for columns in (5, 64, 200):
        starts = find_starts(columns, "32")
        weight, scale = make_weight(6, columns, starts)
        for place in (0, columns // 2, columns - 1):
            x = make_inputs(9, columns, dtype)
            expected = multiply(kernels, x, weight, scale, starts)
            x[1, place] = x[7, place] = value
            expected[1] = expected[7] = float("nan")
            assert torch.equal(multiply(kernels, x, weight, scale, starts).isnan(), expected.isnan())
            torch.testing.assert_close(multiply(kernels, x, weight, scale, starts), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["int8", "float"])
def test_bits_do_not_depend_on_rows_beside_split_or_threads(
    kernels: Kernels, kind: str, dtype: torch.dtype, keep_torch_threads: None
) -> None:
    for columns, rows in ((200, 37), (2048, 150), (577, 1030)):  # the last two leave the second-level cache: blocks of the weight
        starts = find_starts(columns, "128")
        stored, scale = make_weight(rows, columns, starts)
        weight = stored if kind == "int8" else (stored / 100).to(dtype)

        def run(x: torch.Tensor, part: slice, weight: torch.Tensor = weight, scale: torch.Tensor = scale, starts: torch.Tensor = starts
                ) -> torch.Tensor:  # fmt: skip
            if kind == "int8":
                return multiply(kernels, x, weight[part], scale[part], starts)
            return kernels.float_linear(x, weight[part])

        x = make_inputs(100, columns, dtype)
        x[3, -1] = 2  # a float product of the largest number overflows
        torch.set_num_threads(1)
        whole = run(x, slice(None))
        assert whole.isfinite().all()
        for threads in THREADS:
            torch.set_num_threads(threads)
            assert torch.equal(run(x, slice(None)), whole)
            for count in (*range(1, 15), 40):
                assert torch.equal(run(x[count : 2 * count], slice(None)), whole[count : 2 * count]), (threads, count)
        assert torch.equal(torch.cat([run(row, slice(None)) for row in torch.split(x, 1)]), whole)
        assert torch.equal(run(x.flip(0), slice(None)).flip(0), whole)
        for cut in (*range(1, 13), rows // 2, rows - 1):
            for tokens in (1, 4, 100):
                parts = [run(x[:tokens], slice(cut)), run(x[:tokens], slice(cut, None))]
                assert torch.equal(torch.cat(parts, dim=1), whole[:tokens]), (cut, tokens)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", COLUMNS)
def test_nothing_behind_the_last_number_is_read(kernels: Kernels, columns: int, dtype: torch.dtype) -> None:
    for rows, tokens in itertools.product((1, 2, 4, 7), (1, 2, 5, 7)):
        x = place_at_the_end(make_inputs(tokens, columns, dtype))
        for groups in GROUPS:
            starts = place_at_the_end(find_starts(columns, groups))
            weight, scale = (place_at_the_end(one) for one in make_weight(rows, columns, starts))
            assert torch.equal(multiply(kernels, x, weight, scale, starts), multiply_plainly(x, weight, scale, starts))
            kernels.int8_linear(place_at_the_end(x.to(torch.int8)), weight, scale, starts, 0, dtype)
        assert kernels.float_linear(x, place_at_the_end(weight.to(dtype))).shape == (tokens, rows)
        norm = place_at_the_end(torch.ones(columns, dtype=dtype))
        kernels.rms_norm(place_at_the_end(x), x, norm, 1e-5)
        kernels.silu_multiply(place_at_the_end(torch.cat((x, x), dim=1)))


@pytest.mark.parametrize("kind", ["int8", "float"])
def test_no_tokens_give_no_rows(kernels: Kernels, kind: str) -> None:
    """On a thread that has not called a kernel before."""
    weight, scale = make_weight(5, 64, torch.tensor([0, 64]))

    def run() -> torch.Tensor:
        if kind == "int8":
            return multiply(kernels, torch.empty(0, 64), weight, scale, torch.tensor([0, 64]))
        return kernels.float_linear(torch.empty(0, 64), weight.float())

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(run).result().shape == (0, 5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", COLUMNS)
def test_a_float_product_is_off_by_no_more_than_its_roundings(kernels: Kernels, columns: int, dtype: torch.dtype) -> None:
    for rows in range(1, 18):
        generator = torch.Generator().manual_seed(rows)
        weight = torch.randn((rows, columns), generator=generator).to(dtype)
        x = torch.randn((3 * rows % 20 + 1, columns), generator=generator).to(dtype)
        expected, size = x.double() @ weight.double().T, x.double().abs() @ weight.double().abs().T
        allowed = (columns / 16 + 8) * 2.0**-24 * size + ROUNDING[dtype] / 2 * expected.abs() + 1e-30
        if dtype == torch.float16:
            allowed += 2.0**-25  # half the step of denormals
        found = kernels.float_linear(x, weight)
        assert found.dtype == dtype and ((found.double() - expected).abs() <= allowed).all(), rows


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_in_a_row_of_floats_stays_in_its_row(kernels: Kernels, dtype: torch.dtype) -> None:
    weight, x = torch.ones((9, 37), dtype=dtype), torch.ones((8, 37), dtype=dtype)
    x[2, 36] = x[6, 0] = float("nan")
    nan = kernels.float_linear(x, weight).isnan()
    assert nan[[2, 6]].all() and nan.sum() == 18


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 15, 16, 17, 48, 144, 2048])
@pytest.mark.parametrize("has_delta", [False, True])
def test_a_norm_is_that_of_torch_and_adds_in_place(
    kernels: Kernels, has_delta: bool, size: int, dtype: torch.dtype, keep_torch_threads: None
) -> None:
    generator = torch.Generator().manual_seed(size)
    before, delta = (torch.randn((9, size), generator=generator).mul(3).to(dtype) for _ in range(2))
    weight = (torch.rand(size, generator=generator) + 0.5).to(dtype)
    before[4], before[7, 0] = before[4] * 1e-4, float("nan")
    summed = before + delta if has_delta else before
    normed = F.rms_norm(summed.float(), (size,), None, 1e-5).to(dtype) * weight
    for threads in THREADS:
        torch.set_num_threads(threads)
        hidden = before.clone()
        found = kernels.rms_norm(hidden, delta if has_delta else None, weight, 1e-5)
        torch.testing.assert_close(hidden, summed, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(found, normed, rtol=2 * ROUNDING[dtype], atol=1e-7, equal_nan=True)
        alone = [kernels.rms_norm(before[r : r + 1].clone(), delta[r : r + 1] if has_delta else None, weight, 1e-5) for r in range(9)]
        torch.testing.assert_close(torch.cat(alone), found, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 15, 16, 33, 2000])
def test_silu_times_up_is_that_of_float64(kernels: Kernels, size: int, dtype: torch.dtype, keep_torch_threads: None) -> None:
    gate, up = torch.linspace(-110, 110, 7 * size).view(7, size).to(dtype), torch.linspace(-2, 3, size).expand(7, size).to(dtype)
    expected = F.silu(gate.double()) * up.double()
    torch.set_num_threads(1)
    found = kernels.silu_multiply(torch.cat((gate, up), dim=1))
    torch.testing.assert_close(found.double(), expected, rtol=2 * ROUNDING[dtype], atol=1e-7 if dtype == torch.float16 else 1e-35)
    for threads in THREADS:
        torch.set_num_threads(threads)
        assert torch.equal(kernels.silu_multiply(torch.cat((gate, up), dim=1)), found)
    rows = [kernels.silu_multiply(torch.cat((gate[r : r + 1], up[r : r + 1]), dim=1)) for r in range(7)]
    assert torch.equal(torch.cat(rows), found)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_silu_of_extremes_neither_overflows_nor_hides_nan(kernels: Kernels, dtype: torch.dtype) -> None:
    gate = torch.tensor([-1000.0, 1000.0, float("inf"), float("nan"), 0.0, 88.7, -88.7, 89.0, -89.0, 1.0], dtype=dtype)
    up = torch.tensor([2.0] * 9 + [float("nan")], dtype=dtype)
    found = kernels.silu_multiply(torch.cat((gate, up))[None])[0]
    expected = (F.silu(gate.double()) * up.double()).to(dtype)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-30, equal_nan=True)
    assert found[[2]].isinf().all() and found[[3, 9]].isnan().all() and found[4] == 0
