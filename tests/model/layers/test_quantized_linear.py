"""Linears with integer weights: every scheme against plain arithmetic, and the same bits for any split, kernel and threads."""

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import calculate_qparams

from model.backends.int8 import PLAIN, Int8Kernel, choose_cpu_kernel
from model.backends.registry import find_backend
from model.kernels.library import PackedInt4, find_kernels, kernels_disabled
from model.layers.linear import ColumnParallelLinear, RowBlock
from model.layers.quantized_linear import QuantizedColumnParallelLinear, SeparateLinears, StoredLinear, build_linear
from model.spec.linear_scheme import LinearScheme

CPU = torch.device("cpu")
SCHEMES = {
    "a16w8": LinearScheme(),
    "a16w8-g32": LinearScheme(group_size=32),
    "a16w4-g32": LinearScheme(bits=4, group_size=32),
    "a16w4-zero-points": LinearScheme(bits=4, group_size=32, symmetric=False),
    "a16w4-act-order": LinearScheme(bits=4, group_size=32, act_order=True),
    "a16w8-smooth": LinearScheme(smooth=True),
    "a8w8-token": LinearScheme(packed=False, activation="token"),
    "a8w8-token-smooth": LinearScheme(packed=False, activation="token", smooth=True),
    "a8w8-token-g32": LinearScheme(group_size=32, activation="token"),
    "a8w4-token-g32": LinearScheme(bits=4, group_size=32, activation="token"),
    "a8w4-token-zero-points": LinearScheme(bits=4, group_size=32, symmetric=False, activation="token"),
    "a8w4-token-act-order": LinearScheme(bits=4, group_size=32, act_order=True, activation="token"),
    "a8w8-symmetric": LinearScheme(packed=False, activation="tensor"),
    "a8w8": LinearScheme(packed=False, activation="tensor", activation_symmetric=False),
    "a8w8-smooth": LinearScheme(packed=False, activation="tensor", activation_symmetric=False, smooth=True),
}
FLOATS = [name for name, scheme in SCHEMES.items() if scheme.activation is None]
COLUMNS = 144
"""Four groups of 32 and one of 16."""


def make_stored(name: str, rows: int, columns: int = COLUMNS, seed: int = 0) -> StoredLinear:
    generator, scheme = torch.Generator().manual_seed(seed), SCHEMES[name]
    # What is left of 4-bit weights without their zero points needs 5 bits.
    largest = 128 if scheme.bits == 8 else 8 if scheme.symmetric else 16
    groups = scheme.num_groups(columns)
    group_index = torch.randperm(columns, generator=generator).div(32, rounding_mode="floor").int() if scheme.act_order else None
    return StoredLinear(
        weight=torch.randint(-largest + (largest == 16), largest, (rows, columns), generator=generator, dtype=torch.int8),
        scale=torch.rand((rows, groups), generator=generator) / largest + 1e-4,
        group_index=group_index,
        input_scale=float(np.float32(0.031)) if scheme.activation == "tensor" else 1.0,
        input_zero_point=0 if scheme.activation_symmetric else -37,
        smooth_scale=torch.rand(columns, generator=generator) * 3 + 0.1 if scheme.smooth else None,
    )


def take_rows(stored: StoredLinear, rows: slice) -> StoredLinear:
    return StoredLinear(
        weight=stored.weight[rows],
        scale=stored.scale[rows],
        group_index=stored.group_index,
        input_scale=stored.input_scale,
        input_zero_point=stored.input_zero_point,
        smooth_scale=stored.smooth_scale,
    )


def build(name: str, *stored: StoredLinear, kernel: Int8Kernel | None = None) -> QuantizedColumnParallelLinear:
    blocks = [RowBlock(len(one.weight), 16) for one in stored]
    linear = QuantizedColumnParallelLinear(stored[0].weight.shape[1], blocks, SCHEMES[name], kernel or find_backend("cpu").int8_kernel)
    rows = {name: torch.cat([getattr(one, name) for one in stored]) for name in ("weight", "scale")}
    linear.assign(replace(stored[0], **rows), CPU)
    return linear


def make_inputs(rows: int, columns: int = COLUMNS, seed: int = 1) -> torch.Tensor:
    x = torch.randn((rows, columns), generator=torch.Generator().manual_seed(seed))
    x[:, 3] *= 20
    return x


def dequantize(stored: StoredLinear) -> torch.Tensor:
    """float64 [rows, columns], element by element."""
    columns = stored.weight.shape[1]
    groups = torch.arange(columns) // (32 if stored.scale.shape[1] > 1 else columns) if stored.group_index is None else stored.group_index
    return stored.weight.double() * stored.scale.double()[:, groups.long()]


def round_inputs(stored: StoredLinear, x: torch.Tensor) -> torch.Tensor:
    """Integers of static activations, in numpy: the divisor is made first, as the original stores it."""
    smooth = np.float32(1) if stored.smooth_scale is None else stored.smooth_scale.numpy()
    divisor = smooth * np.float32(stored.input_scale)
    return torch.from_numpy(np.clip(np.rint(x.numpy() / divisor + np.float32(stored.input_zero_point)), -128, 127)).long()


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("rows", [1, 5])
def test_float_activations_are_off_by_no_more_than_half_a_step_of_the_last_slice(name: str, rows: int) -> None:
    stored, x = make_stored(name, 48), make_inputs(rows)
    weight = dequantize(stored)
    smoothed = x.double() if stored.smooth_scale is None else x.double() / stored.smooth_scale.double()
    half_step = smoothed.abs().amax(dim=1, keepdim=True) / 127 / 254**2 / 2
    allowed = half_step * weight.abs().sum(dim=1) + 5e-7 * smoothed.abs() @ weight.abs().T
    found = build(name, stored)(x)
    assert found.dtype == torch.float32 and ((found.double() - smoothed @ weight.T).abs() <= allowed).all()


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_activations_are_rounded_once_more_at_the_end(name: str, dtype: torch.dtype) -> None:
    """Two slices, and then the type's own rounding."""
    stored, x = make_stored(name, 48), make_inputs(5).to(dtype)
    weight = dequantize(stored)
    smoothed = x.double() if stored.smooth_scale is None else x.double() / stored.smooth_scale.double()
    expected = smoothed @ weight.T
    step = smoothed.abs().amax(dim=1, keepdim=True) / 127 / 254
    allowed = step * weight.abs().sum(dim=1) + torch.finfo(dtype).eps * expected.abs()
    found = build(name, stored)(x)
    assert found.dtype == dtype and ((found.double() - expected).abs() <= allowed).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_a_shuffled_group_index_gives_what_sorted_columns_give(bits: int) -> None:
    SCHEMES["shuffled"] = LinearScheme(bits=bits, group_size=32, act_order=True)
    SCHEMES["sorted"] = LinearScheme(bits=bits, group_size=32)
    stored, x = make_stored("shuffled", 20), make_inputs(3)
    assert stored.group_index is not None and not torch.equal(stored.group_index, stored.group_index.sort().values)
    order = torch.argsort(stored.group_index, stable=True)
    in_order = StoredLinear(weight=stored.weight[:, order].contiguous(), scale=stored.scale)
    assert torch.equal(build("shuffled", stored)(x), build("sorted", in_order)(x[:, order].contiguous()))
    del SCHEMES["shuffled"], SCHEMES["sorted"]


def test_dynamic_activations_are_rounded_half_to_even_and_cut_at_127() -> None:
    x = torch.tensor([[127.5, -127.5, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, 0.0]])
    identity = StoredLinear(weight=torch.eye(10, dtype=torch.int8), scale=torch.ones(10, 1))
    expected = torch.tensor([[127.0, -128, 0, 2, 2, 0, -2, -2, 126, 0]])
    assert torch.equal(build("a8w8-token", identity)(x), expected)


@pytest.mark.parametrize("smooth", [False, True])
def test_dynamic_activations_give_the_exact_integer_product_times_both_scales(smooth: bool) -> None:
    name = "a8w8-token-smooth" if smooth else "a8w8-token"
    stored, x = make_stored(name, 48), make_inputs(7)
    divided = x / stored.smooth_scale if stored.smooth_scale is not None else x
    row_scale = divided.abs().amax(dim=1, keepdim=True) / 127.5
    integers = torch.from_numpy(np.clip(np.rint((divided / row_scale).numpy()), -128, 127)).long()
    expected = (integers @ stored.weight.long().T).float() * stored.scale[:, 0] * row_scale
    assert torch.equal(build(name, stored)(x), expected)


@pytest.mark.parametrize("name", [name for name in SCHEMES if "-token-" in name and "smooth" not in name])
def test_dynamic_activations_of_grouped_weights_are_the_product_of_the_rounded_inputs(name: str) -> None:
    stored, x = make_stored(name, 48), make_inputs(7)
    row_scale = x.abs().amax(dim=1, keepdim=True) / 127.5
    rounded = torch.from_numpy(np.clip(np.rint((x / row_scale).numpy()), -128, 127)).double() * row_scale.double()
    weight = dequantize(stored)
    error = build(name, stored)(x).double() - rounded @ weight.T
    assert (error.abs() <= 1e-6 * rounded.abs() @ weight.abs().T).all()


def test_dynamic_activations_are_rounded_as_compressed_tensors_does_it() -> None:
    x = torch.cat((make_inputs(40, seed=2), make_inputs(40, seed=3) * torch.logspace(-6, 3, 40).unsqueeze(1)))
    args = QuantizationArgs(num_bits=8, type="int", symmetric=True, strategy="token", dynamic=True)
    scale, zero_point = calculate_qparams(x.amin(dim=1, keepdim=True), x.amax(dim=1, keepdim=True), args)
    identity = StoredLinear(weight=torch.eye(COLUMNS, dtype=torch.int8), scale=torch.ones(COLUMNS, 1))
    assert torch.equal(build("a8w8-token", identity)(x), fake_quantize(x, scale, zero_point, args))


def test_dynamic_rows_of_zeros_give_zeros() -> None:
    assert torch.equal(build("a8w8-token", make_stored("a8w8-token", 16))(torch.zeros(2, COLUMNS)), torch.zeros(2, 16))


@pytest.mark.parametrize("name", ["a8w8-symmetric", "a8w8", "a8w8-smooth"])
def test_static_activations_are_rounded_to_the_integers_of_the_formula(name: str) -> None:
    """Read off through an identity weight; values beyond the range are cut."""
    made, x = make_stored(name, COLUMNS), make_inputs(9) * 3
    x[0, :6] = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, -2.5]) * made.input_scale
    stored = StoredLinear(
        weight=torch.eye(COLUMNS, dtype=torch.int8),
        scale=torch.ones(COLUMNS, 1),
        input_scale=made.input_scale,
        input_zero_point=made.input_zero_point,
        smooth_scale=made.smooth_scale,
    )
    integers = round_inputs(stored, x)
    assert integers.min() == -128 and integers.max() == 127
    expected = (integers - stored.input_zero_point).float() * np.float32(stored.input_scale)
    assert torch.equal(build(name, stored)(x), expected)


def test_static_halves_go_to_the_even_integer() -> None:
    x = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, 1e9, -1e9]])
    for zero_point, expected in ((0, [0, 2, 2, 0, -2, 127, -128]), (-7, [1, 1, 3, -1, -1, 134, -121])):
        stored = StoredLinear(weight=torch.eye(7, dtype=torch.int8), scale=torch.ones(7, 1), input_zero_point=zero_point)
        # x + zero point is what is rounded: -6.5 goes to -6, so that 0.5 counts as 1.
        assert build("a8w8", stored)(x)[0].tolist() == expected


@pytest.mark.parametrize("name", ["a8w8-symmetric", "a8w8", "a8w8-smooth"])
def test_static_products_are_those_of_golden_stick(name: str) -> None:
    """An integer product, a scale for each row, and a bias that takes the zero point off."""
    stored, x = make_stored(name, 48), make_inputs(9)
    product = round_inputs(stored, x) @ stored.weight.long().T
    scale = stored.scale[:, 0] * np.float32(stored.input_scale)
    bias = -(stored.input_zero_point * stored.weight.long().sum(dim=1)).float() * scale
    size = product.abs().amax().float() * scale + bias.abs()
    error = build(name, stored)(x) - (product.float() * scale + bias)
    assert (error.abs() <= 1e-6 * size).all()


@pytest.mark.parametrize("name", ["a8w8", "a8w8-smooth"])
def test_a_static_product_with_zero_points_is_near_the_float_product(name: str) -> None:
    stored, x = make_stored(name, 48), make_inputs(9) / 10
    divided = x.double() if stored.smooth_scale is None else x.double() / stored.smooth_scale.double()
    divided = divided.clamp((-128 + 37) * stored.input_scale, (127 + 37) * stored.input_scale)
    weight = dequantize(stored)
    allowed = stored.input_scale / 2 * weight.abs().sum(dim=1) * 1.001 + 1e-5
    assert ((build(name, stored)(x).double() - divided @ weight.T).abs() <= allowed).all()


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_split_at_units_keep_their_bits_in_one_block_and_in_three(name: str, dtype: torch.dtype) -> None:
    stored = make_stored(name, 80)
    whole = build(name, stored)
    for cuts in ((0, 16, 80), (0, 32, 48, 80)):
        parts = [take_rows(stored, slice(start, stop)) for start, stop in itertools.pairwise(cuts)]
        ranks, fused = [build(name, part) for part in parts], build(name, *parts)
        for rows in (1, 6):
            x = make_inputs(rows).to(dtype)
            expected = whole(x)
            assert expected.dtype == dtype and torch.equal(fused(x), expected)
            assert torch.equal(torch.cat([rank(x) for rank in ranks], dim=1), expected)


@pytest.mark.parametrize("name", SCHEMES)
def test_every_kernel_and_number_of_threads_gives_the_same_bits(name: str, keep_torch_threads: None) -> None:
    columns = 1100 if SCHEMES[name].group_size is None else 144
    stored = make_stored(name, 272, columns)
    kernels = list(dict.fromkeys((PLAIN, choose_cpu_kernel(), find_backend("cpu").int8_kernel)))
    for rows in (1, 21):
        x, found = make_inputs(rows, columns), []
        for kernel in kernels:
            linear = build(name, stored, kernel=kernel)
            for threads in (1, 2):
                torch.set_num_threads(threads)
                found.append(linear(x))
        assert all(torch.equal(other, found[0]) for other in found[1:])


@pytest.mark.parametrize("name", SCHEMES)
def test_a_row_does_not_depend_on_the_rows_beside_it(name: str) -> None:
    linear, x = build(name, make_stored(name, 33)), make_inputs(19)
    whole = linear(x)
    for start, stop in ((0, 1), (4, 9), (18, 19)):
        assert torch.equal(linear(x[start:stop].clone()), whole[start:stop])


def test_weight_bytes_count_what_is_in_memory() -> None:
    assert build("a16w8", make_stored("a16w8", 48)).weight_bytes == 48 * (COLUMNS + 4)
    with kernels_disabled():
        assert build("a16w4-g32", make_stored("a16w4-g32", 48)).weight_bytes == 48 * (COLUMNS + 4 * 5)
    linear = build("a16w4-g32", make_stored("a16w4-g32", 48))
    if find_kernels() is not None:
        whole = linear.find_whole()
        assert isinstance(whole, PackedInt4)
        assert linear.weight_bytes == whole.packed.nbytes + whole.scale.nbytes + whole.zeros.nbytes < 48 * (COLUMNS / 2 + 6 * 5)


def build_three(*schemes: LinearScheme | None) -> Any:
    return build_linear(COLUMNS, [RowBlock(16, 16), RowBlock(32, 16), RowBlock(48, 16)], schemes, torch.float32, find_backend("cpu"))


@pytest.mark.parametrize("name", ["a16w8", "a16w8-g32", "a16w4-g32", "a16w4-zero-points", "a8w8-token"])
def test_linears_that_are_stored_alike_are_one_product(name: str) -> None:
    linear = build_three(*[SCHEMES[name]] * 3)
    assert isinstance(linear, QuantizedColumnParallelLinear) and [block.num_rows for block in linear.blocks] == [16, 32, 48]


@pytest.mark.parametrize("name", ["a16w4-act-order", "a16w8-smooth", "a8w8-symmetric", "a8w8", "a8w8-smooth", "a8w8-token-smooth"])
def test_linears_with_inputs_of_their_own_are_separate_products_in_order(name: str) -> None:
    linear = build_three(*[SCHEMES[name]] * 3)
    assert isinstance(linear, SeparateLinears)
    stored = [make_stored(name, rows, seed=rows) for rows in (16, 32, 48)]
    for alone, one in zip(linear.linears, stored, strict=True):
        assert isinstance(alone, QuantizedColumnParallelLinear)
        alone.assign(one, CPU)
    x = make_inputs(5)
    assert torch.equal(linear(x), torch.cat([build(name, one)(x) for one in stored], dim=1))


def test_a_float_linear_between_integer_ones_makes_separate_products() -> None:
    linear = build_three(SCHEMES["a16w8"], None, SCHEMES["a16w8"])
    assert isinstance(linear, SeparateLinears)
    assert [type(one) for one in linear.linears] == [QuantizedColumnParallelLinear, ColumnParallelLinear, QuantizedColumnParallelLinear]
    assert isinstance(build_three(None, SCHEMES["a16w8"], SCHEMES["a16w8"]), SeparateLinears)
    assert isinstance(build_three(SCHEMES["a16w8"], SCHEMES["a16w8-g32"], SCHEMES["a16w8"]), SeparateLinears)


def test_float_linears_are_one_product() -> None:
    assert isinstance(build_three(None, None, None), ColumnParallelLinear)


def test_one_linear_with_inputs_of_its_own_is_no_list() -> None:
    linear = build_linear(COLUMNS, [RowBlock(16, 16)], [SCHEMES["a8w8-smooth"]], torch.float32, find_backend("cpu"))
    assert isinstance(linear, QuantizedColumnParallelLinear)
