"""Rounding, smoothing, GPTQ and AWQ: against Golden Stick's own files, plain numpy, compressed-tensors, and what they promise."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import quantize
from compressed_tensors.quantization.utils import calculate_qparams
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from model.layers.rounding import (
    asymmetric_scale,
    choose_group_scales,
    quantize_groups,
    quantize_rows,
    round_to_integers,
    symmetric_scale,
)
from model.quantization.awq import dequantize, search_scale
from model.quantization.gptq import invert_hessian, quantize_gptq
from model.quantization.smoothing import smooth_scale

LINEARS = [f"model.layers.{layer}.{name}" for layer in (0, 1) for name in ("attention.wq", "attention.wk", "attention.wv", "attention.wo")]
LINEARS += [f"model.layers.{layer}.feed_forward.{name}" for layer in (0, 1) for name in ("w1", "w2", "w3")]


@pytest.fixture(scope="module")
def golden(shared_dir: Path) -> dict[str, Any]:
    """Arrays that Golden Stick wrote, and the float weights that it had."""
    folder = shared_dir / "data" / "mindspore_ckpt" / "golden_stick"
    return {name: dict(np.load(folder / f"{name}.npz")) for name in ("fp_float32", "rtn-a16w8_float32", "ptq_a16w8_float32")}


@pytest.mark.parametrize("linear", LINEARS)
def test_rows_are_rounded_to_the_integers_and_scales_of_golden_stick(linear: str, golden: dict[str, Any]) -> None:
    integers, scale = quantize_rows(torch.from_numpy(golden["fp_float32"][f"{linear}.weight"]))
    rtn, ptq = golden["rtn-a16w8_float32"], golden["ptq_a16w8_float32"]
    assert np.array_equal(integers.numpy(), rtn[f"{linear}._handler.weight"])
    assert np.array_equal(scale[:, 0].numpy(), rtn[f"{linear}._weight_quantizer.scale"])
    assert not rtn[f"{linear}._weight_quantizer.zp_neg"].any()
    # PTQ rounds with float32 scales, and stores them as float16.
    assert np.array_equal(integers.numpy(), ptq[f"{linear}._layer.weight"])
    assert np.array_equal(scale[:, 0].half().numpy(), ptq[f"{linear}._layer.matmul.t_scale"])


def round_rows_in_numpy(weight: np.ndarray[Any, Any], bits: int = 8) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Golden Stick's formula: the scale in float32, then everything in the weight's type."""
    absmax = np.abs(weight).max(axis=1, keepdims=True).astype(np.float32)
    scale = (absmax * np.float32(2) / np.float32(2**bits - 1)).astype(weight.dtype)
    scale[scale == 0] = 1
    integers = np.clip(np.rint(weight / scale), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    assert integers.dtype == weight.dtype
    return integers.astype(np.int8), scale


@pytest.mark.parametrize("kind", [np.float16, np.float32])
@pytest.mark.parametrize("bits", [4, 8])
def test_rows_of_usual_weights_are_rounded_as_numpy_does_it_in_their_type(bits: int, kind: type[np.floating[Any]]) -> None:
    weight = (np.random.default_rng(0).standard_normal((200, 300)) * 0.05).astype(kind)
    integers, scale = quantize_rows(torch.from_numpy(weight), bits)
    expected, expected_scale = round_rows_in_numpy(weight, bits)
    assert np.array_equal(integers.numpy(), expected) and np.array_equal(scale.numpy(), expected_scale)


@given(st.data(), st.sampled_from([np.float16, np.float32]), st.sampled_from([4, 8]))
@settings(max_examples=150, deadline=None)
def test_rows_of_any_finite_weights_are_rounded_as_numpy_does_it(data: st.DataObject, kind: type[np.floating[Any]], bits: int) -> None:
    largest = 60000 if kind is np.float16 else 2.0**100
    floats = st.floats(-largest, largest, width=16 if kind is np.float16 else 32, allow_subnormal=False)
    weight = data.draw(arrays.arrays(kind, st.tuples(st.integers(1, 3), st.integers(1, 9)), elements=floats))
    integers, scale = quantize_rows(torch.from_numpy(weight), bits)
    expected, expected_scale = round_rows_in_numpy(weight, bits)
    assert np.array_equal(scale.numpy(), expected_scale) and np.array_equal(integers.numpy(), expected)


def test_float16_weights_are_divided_in_float16() -> None:
    weight = (np.random.default_rng(1).standard_normal((100, 300)) * 0.05).astype(np.float16)
    integers, scale = quantize_rows(torch.from_numpy(weight))
    wide = np.clip(np.rint(weight.astype(np.float32) / scale.numpy().astype(np.float32)), -128, 127)
    # float32 would round about one in seventy differently.
    assert scale.dtype == torch.float16 and 0.002 < (integers.numpy() != wide).mean() < 0.05


def test_halves_go_to_the_even_integer_and_ends_are_cut() -> None:
    scaled = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 6.5, 7.5, 127.5, 500.0, -8.5, -128.5, -500.0])
    assert round_to_integers(scaled, 8).tolist() == [0, 2, 2, 0, -2, -2, 6, 8, 127, 127, -8, -128, -128]
    assert round_to_integers(scaled, 4).tolist() == [0, 2, 2, 0, -2, -2, 6, 7, 7, 7, -8, -8, -8]
    integers, scale = quantize_rows(torch.tensor([[127.5, -127.5, 0.5, 1.5, -0.5]]))
    assert float(scale) == 1 and integers.tolist() == [[127, -128, 0, 2, 0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_and_groups_of_zeros_get_scale_one_and_zeros(dtype: torch.dtype) -> None:
    weight = torch.ones((3, 8), dtype=dtype)
    weight[1] = 0
    weight[2, :4] = 0
    integers, scale = quantize_rows(weight)
    assert scale.dtype == dtype and float(scale[1]) == 1 and not integers[1].any()
    for symmetric in (True, False):
        integers, scale, zero_points = quantize_groups(weight, 4, 4, symmetric=symmetric)
        assert scale[1].tolist() == [1, 1] and float(scale[2, 0]) == 1
        assert not dequantize(integers, scale, zero_points)[1].any() and not dequantize(integers, scale, zero_points)[2, :4].any()


def test_symmetric_scales_have_255_steps_from_end_to_end() -> None:
    assert symmetric_scale(torch.tensor([255.0])).tolist() == [2.0]
    assert symmetric_scale(torch.tensor([7.5]), 4).tolist() == [1.0]


def test_asymmetric_scales_are_those_of_numpy() -> None:
    random = np.random.default_rng(2)
    low, high = -random.random(500).astype(np.float32) * 9, random.random(500).astype(np.float32) * 5
    scale, zero_point = asymmetric_scale(torch.from_numpy(low), torch.from_numpy(high))
    expected = (high - low) / np.float32(255)
    assert np.array_equal(scale.numpy(), expected) and zero_point.dtype == torch.int8
    assert np.array_equal(zero_point.numpy(), np.clip(np.rint(-128 - low / expected), -128, 127).astype(np.int8))


def test_asymmetric_integers_reach_from_end_to_end() -> None:
    low, high = torch.tensor([-3.0, 0.0, -2.0]), torch.tensor([1.0, 5.0, 0.0])
    scale, zero_point = asymmetric_scale(low, high)
    assert zero_point.tolist() == [63, -128, 127]
    for x in (low, high, torch.zeros(3)):
        back = (round_to_integers(x / scale + zero_point, 8) - zero_point.float()) * scale
        assert ((back - x).abs() <= scale * 0.51).all()


def test_an_empty_range_gets_scale_one_and_zero_point_zero() -> None:
    scale, zero_point = asymmetric_scale(torch.zeros(2), torch.tensor([0.0, 1.0]))
    assert scale.tolist() == [1.0, float(np.float32(1) / np.float32(255))] and zero_point.tolist() == [0, -128]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("shift", [0.0, 0.2, -0.2, 5.0])
def test_groups_of_four_bits_are_those_of_compressed_tensors(symmetric: bool, shift: float) -> None:
    """With a shift of 5 all weights have one sign: the range is widened to hold 0."""
    weight = torch.randn((40, 96), generator=torch.Generator().manual_seed(4)) * 0.1 + shift
    args = QuantizationArgs(num_bits=4, type="int", symmetric=symmetric, strategy="group", group_size=32)
    grouped = weight.view(40, -1, 32)
    scale, zero_point = calculate_qparams(grouped.amin(dim=2), grouped.amax(dim=2), args)
    expected = quantize(weight, scale, zero_point, args, dtype=torch.int8)
    integers, found_scale, found_zero_point = quantize_groups(weight, 4, 32, symmetric=symmetric)
    torch.testing.assert_close(found_scale, scale, rtol=1.2e-7, atol=0)
    if symmetric:
        assert found_zero_point is None
    else:
        assert found_zero_point is not None and found_zero_point.dtype == torch.int8 and torch.equal(found_zero_point, zero_point)
    # A scale may differ in its last bit, and that in one of many integers.
    assert (integers != expected).sum() <= 2 and (integers - expected).abs().max() <= 1


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_groups_come_back_within_half_a_step(symmetric: bool, dtype: torch.dtype) -> None:
    weight = (torch.randn((16, 64), generator=torch.Generator().manual_seed(5)) + 0.3).to(dtype)
    integers, scale, zero_points = quantize_groups(weight, 4, 16, symmetric=symmetric)
    assert integers.min() >= -8 and integers.max() <= 7 and scale.shape == (16, 4) and scale.dtype == dtype
    error = (dequantize(integers, scale, zero_points) - weight.float()).abs()
    # Where not symmetric the ends are off by up to half a step more: the zero point has been rounded too.
    assert (
        error <= scale.float().repeat_interleave(16, dim=1) * ((0.52 if symmetric else 1.02) + (0.1 if dtype != torch.float32 else 0))
    ).all()


def test_choose_group_scales_takes_any_leading_shape() -> None:
    grouped = torch.randn((5, 4, 16), generator=torch.Generator().manual_seed(6))
    whole, points = choose_group_scales(grouped, 4, symmetric=False)
    one, point = choose_group_scales(grouped[:, 2], 4, symmetric=False)
    assert points is not None and point is not None and torch.equal(whole[:, 2], one) and torch.equal(points[:, 2], point)


def test_smooth_scales_are_those_of_numpy() -> None:
    random = np.random.default_rng(7)
    act, weight = random.random(200).astype(np.float32) * 90, random.random(200).astype(np.float32)
    for alpha in (0.0, 0.3, 0.5, 0.8, 1.0):
        expected = np.maximum(act.astype(np.float64) ** alpha / weight.astype(np.float64) ** (1 - alpha), 1e-5)
        np.testing.assert_allclose(smooth_scale(torch.from_numpy(act), torch.from_numpy(weight), alpha).numpy(), expected, rtol=2e-6)


def test_smooth_scales_of_dead_channels_are_one_and_small_ones_are_held_up() -> None:
    act, weight = torch.tensor([0.0, 4.0, 0.0, 1e-12, 4.0]), torch.tensor([4.0, 0.0, 0.0, 1e4, 4.0])
    torch.testing.assert_close(smooth_scale(act, weight, 0.5), torch.tensor([1.0, 1.0, 1.0, 1e-5, 1.0]), rtol=1e-6, atol=0)


def test_alpha_one_moves_everything_and_alpha_zero_follows_the_weights() -> None:
    act, weight = torch.tensor([9.0, 0.25]), torch.tensor([2.0, 5.0])
    assert smooth_scale(act, weight, 1.0).tolist() == [9.0, 0.25]
    torch.testing.assert_close(smooth_scale(act, weight, 0.0), 1 / weight)


def make_correlated(tokens: int, columns: int, seed: int = 8) -> torch.Tensor:
    """Inputs that mostly lie in a quarter of the dimensions."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn((tokens, columns // 4), generator=generator) @ torch.randn((columns // 4, columns), generator=generator)
    return mixed + 0.1 * torch.randn((tokens, columns), generator=generator)


def make_weight(rows: int, columns: int, seed: int = 9) -> torch.Tensor:
    return torch.randn((rows, columns), generator=torch.Generator().manual_seed(seed)) * 0.05


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "group_size"), [(4, 32), (4, 320), (8, 64)])
def test_gptq_with_inputs_of_no_direction_rounds_to_nearest(bits: int, group_size: int, symmetric: bool) -> None:
    weight = make_weight(24, 320)
    integers, scales, zero_points = quantize_gptq(weight, invert_hessian(torch.eye(320)), bits, group_size, symmetric=symmetric)
    expected, expected_scales, expected_points = quantize_groups(weight, bits, group_size, symmetric=symmetric)
    assert torch.equal(scales, expected_scales)
    assert (zero_points is None) == symmetric
    if zero_points is not None and expected_points is not None:
        assert torch.equal(zero_points, expected_points)
    # x / scale + zero point, and the same from a transposed memory: a half may fall either way.
    assert (integers != expected).sum() <= 1


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("columns", "group_size"), [(320, 32), (192, 48), (96, 96), (384, 192)])
def test_gptq_leaves_less_error_of_the_outputs_than_rounding_to_nearest(columns: int, group_size: int, symmetric: bool) -> None:
    weight, x = make_weight(16, columns), make_correlated(1500, columns)

    def error(integers: torch.Tensor, scales: torch.Tensor, zero_points: torch.Tensor | None) -> float:
        return float((x @ (dequantize(integers, scales, zero_points) - weight).T).norm())

    found = error(*quantize_gptq(weight, invert_hessian(x.T @ x), 4, group_size, symmetric=symmetric))
    assert found < 0.7 * error(*quantize_groups(weight, 4, group_size, symmetric=symmetric))


def round_by_the_paper(weight: torch.Tensor, hessian: torch.Tensor, group_size: int) -> torch.Tensor:
    """OBQ in float64, one column after another, with the inverse of what is left of H made anew each time."""
    left, columns = weight.double().clone(), weight.shape[1]
    damped = hessian.double() + torch.eye(columns) * hessian.diagonal().double().mean() * 0.01
    integers = torch.empty(weight.shape, dtype=torch.int8)
    scale = torch.empty(0)
    for column in range(columns):
        if column % group_size == 0:
            scale = left[:, column : column + group_size].abs().amax(dim=1) * 2 / 15
        inverse = torch.linalg.inv(damped[column:, column:])
        integers[:, column] = round_to_integers(left[:, column] / scale, 4)
        error = (left[:, column] - integers[:, column] * scale) / inverse[0, 0]
        left[:, column:] -= error.unsqueeze(1) * inverse[0]
    return integers


def test_gptq_rounds_as_the_paper_says() -> None:
    weight, x = make_weight(16, 144), make_correlated(600, 144)
    integers, _, _ = quantize_gptq(weight, invert_hessian(x.T @ x), 4, 48, symmetric=True)
    expected = round_by_the_paper(weight, x.T @ x, 48)
    # One value that falls the other way in float32 changes the rest of its row.
    assert (integers == expected).all(dim=1).sum() >= 12 and (integers != expected).float().mean() < 0.05


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [32, 160])
def test_gptq_rows_do_not_see_each_other(group_size: int, symmetric: bool) -> None:
    weight, x = make_weight(64, 320), make_correlated(500, 320)
    upper = invert_hessian(x.T @ x)
    whole = quantize_gptq(weight, upper, 4, group_size, symmetric=symmetric)
    for start, stop in ((0, 8), (8, 40), (40, 64), (3, 20), (5, 7)):
        for part, one in zip(quantize_gptq(weight[start:stop].clone(), upper, 4, group_size, symmetric=symmetric), whole, strict=True):
            assert part is one or (part is not None and one is not None and torch.equal(part, one[start:stop])), (start, stop)


def test_gptq_leaves_its_weight_as_it_was_and_keeps_its_type() -> None:
    x = make_correlated(300, 64)
    for dtype in (torch.float32, torch.bfloat16):
        weight = make_weight(8, 64).to(dtype)
        before = weight.clone()
        integers, scales, _ = quantize_gptq(weight, invert_hessian(x.T @ x), 4, 32, symmetric=True)
        assert torch.equal(weight, before) and scales.dtype == dtype and scales.shape == (8, 2) and integers.dtype == torch.int8


def test_channels_that_were_never_active_are_rounded_to_nearest_and_disturb_nothing() -> None:
    weight, x = make_weight(8, 96), make_correlated(400, 96)
    x[:, [5, 40, 95]] = 0
    upper = invert_hessian(x.T @ x)
    assert upper.isfinite().all()
    integers, scales, _ = quantize_gptq(weight, upper, 4, 96, symmetric=True)
    expected, _, _ = quantize_groups(weight, 4, 96, symmetric=True)
    assert torch.equal(integers[:, [5, 40, 95]], expected[:, [5, 40, 95]]) and scales.isfinite().all()


def test_a_hessian_without_full_rank_is_damped_and_one_that_is_not_finite_refused() -> None:
    x = make_correlated(3, 64)
    assert invert_hessian(x.T @ x).isfinite().all()
    upper = invert_hessian(torch.zeros(8, 8))
    torch.testing.assert_close(upper, torch.eye(8) / 1.01**0.5)
    with pytest.raises(ValueError, match="not finite"):
        invert_hessian(torch.full((4, 4), float("nan")))


def search(weight: torch.Tensor, x: torch.Tensor, **options: Any) -> torch.Tensor:
    """The scale for this weight and its double, which have one input."""
    places = []

    def add_up(place: int, errors: torch.Tensor) -> float:
        places.append(place)
        return float(errors.double().sum())

    mean = x.abs().mean(dim=0)
    scale = search_scale([weight, weight * 2], x, mean, 4, 32, symmetric=True, add_up=add_up, **options)
    assert places == [0, 1] * 20
    return scale


def measure(weight: torch.Tensor, x: torch.Tensor, scale: torch.Tensor) -> float:
    integers, scales, zero_points = quantize_groups(weight * scale, 4, 32, symmetric=True)
    return float((x @ (dequantize(integers, scales, zero_points) / scale - weight).T).norm())


def test_awq_leaves_less_error_than_scale_one() -> None:
    weight, x = make_weight(48, 96), make_correlated(256, 96)
    x[:, [4, 50]] *= 40
    scale = search(weight, x)
    assert scale.shape == (96,) and scale[4] > 2 * scale.median()
    assert measure(weight, x, scale) < 0.9 * measure(weight, x, torch.ones(96))


def test_awq_finds_nothing_better_than_one_for_inputs_that_are_all_alike() -> None:
    scale = search(make_weight(48, 96), torch.ones(64, 96))
    torch.testing.assert_close(scale, torch.ones(96))


def test_awq_keeps_channels_equal_that_are_shared() -> None:
    def share(scale: torch.Tensor) -> torch.Tensor:
        return scale.view(3, -1).amax(dim=0).repeat(3)

    scale = search(make_weight(16, 96), make_correlated(256, 96) * torch.logspace(-1, 1, 96), share=share)
    assert torch.equal(scale.view(3, -1)[0], scale.view(3, -1)[1]) and scale.max() > scale.min()
