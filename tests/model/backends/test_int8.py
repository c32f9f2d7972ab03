"""int8 products: every kernel against exact arithmetic and against each other, and the two slices against float64."""

import pytest
import torch

from model.backends import int8
from model.backends.int8 import FBGEMM, PLAIN, Int8Kernel, Part, choose_cpu_kernel, sliced_linear
from model.backends.torch_backends import TorchBackend

SHAPES = ((1, 1, 1), (2, 3, 5), (1, 16, 31), (3, 17, 64), (5, 33, 100), (16, 64, 129), (2, 300, 1025), (33, 48, 4099))
KERNELS = (PLAIN, FBGEMM)


@pytest.fixture(params=KERNELS, ids=lambda kernel: kernel.name)
def kernel(request: pytest.FixtureRequest) -> Int8Kernel:
    """Each kernel in turn; a processor without exact 8-bit products has only the plain one."""
    if request.param is FBGEMM and choose_cpu_kernel() is not FBGEMM:
        pytest.skip("FBGEMM has no exact 8-bit products on this processor")
    assert isinstance(request.param, Int8Kernel)
    return request.param


def make_integers(rows: int, outputs: int, columns: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(slices as float32 [rows, columns], weight int8 [outputs, columns], scale float32 [outputs])."""
    generator = torch.Generator().manual_seed(seed)
    slices = torch.randint(-127, 128, (rows, columns), generator=generator).float()
    weight = torch.randint(-128, 128, (outputs, columns), generator=generator, dtype=torch.int8)
    return slices, weight, torch.rand(outputs, generator=generator) + 1e-3


def multiply_exactly(slices: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (slices.long() @ weight.long().T).float() * scale


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_product_is_the_integer_product_rounded_once_and_scaled(kernel: Int8Kernel, shape: tuple[int, int, int]) -> None:
    slices, weight, scale = make_integers(*shape)
    assert torch.equal(kernel.multiply(slices, kernel.pack(weight, scale)), multiply_exactly(slices, weight, scale))


@pytest.mark.parametrize("columns", [7, 1024, 2048, 5000])
@pytest.mark.parametrize("value", [-128, 127])
def test_products_of_extremes_do_not_saturate_or_lose_a_unit(kernel: Int8Kernel, value: int, columns: int) -> None:
    slices = torch.full((3, columns), 127.0)
    slices[1] = -127
    slices[2, 1::2] = -127
    weight = torch.full((5, columns), value, dtype=torch.int8)
    weight[1, 0] += 1 if value < 0 else -1
    scale = torch.tensor([1.0, 1.0, 0.1, 3.0, 1e-8])
    assert torch.equal(kernel.multiply(slices, kernel.pack(weight, scale)), multiply_exactly(slices, weight, scale))


def test_fbgemm_gives_the_bits_of_the_plain_kernel_for_real_activations() -> None:
    if choose_cpu_kernel() is not FBGEMM:
        pytest.skip("FBGEMM has no exact 8-bit products on this processor")
    for seed, (rows, outputs, columns) in enumerate(SHAPES):
        torch.manual_seed(seed)
        x = torch.randn(rows, columns) * torch.randn(columns).exp()
        _, weight, scale = make_integers(rows, outputs, columns, seed)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            plain, fast = (multiply(x.to(dtype), weight, scale, kernel) for kernel in (PLAIN, FBGEMM))
            assert torch.equal(plain, fast), (rows, outputs, columns, dtype)


def make_activations(rows: int, columns: int) -> torch.Tensor:
    torch.manual_seed(5)
    x = torch.randn(rows, columns)
    x[:, 3] *= 300
    return x


def multiply(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, kernel: Int8Kernel) -> torch.Tensor:
    return sliced_linear(x, [Part(0, weight.shape[1], kernel.pack(weight, scale))], kernel)


def test_a_row_does_not_depend_on_the_number_of_rows_or_on_its_neighbours(kernel: Int8Kernel) -> None:
    _, weight, scale = make_integers(1, 70, 333)
    packed, x = [Part(0, 333, kernel.pack(weight, scale))], make_activations(37, 333)
    whole = sliced_linear(x, packed, kernel)
    for start, stop in [(0, 1), (1, 2), (4, 9), (20, 37), (36, 37)]:
        assert torch.equal(sliced_linear(x[start:stop], packed, kernel), whole[start:stop])
    order = torch.randperm(37)
    assert torch.equal(sliced_linear(x[order], packed, kernel), whole[order])


def test_a_row_does_not_depend_on_the_number_of_threads(kernel: Int8Kernel, keep_torch_threads: None) -> None:
    _, weight, scale = make_integers(1, 520, 1200)
    packed = [Part(0, weight.shape[1], kernel.pack(weight, scale))]
    for rows in (1, 2, 5, 33):
        x, found = make_activations(rows, 1200), []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(sliced_linear(x, packed, kernel))
        assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_weight_rows_may_be_split_anywhere(kernel: Int8Kernel) -> None:
    _, weight, scale = make_integers(1, 300, 257)
    for rows in (1, 6):
        x = make_activations(rows, 257)
        whole = multiply(x, weight, scale, kernel)
        for cut in (1, 16, 77, 256, 299):
            parts = [multiply(x, weight[part], scale[part], kernel) for part in (slice(cut), slice(cut, None))]
            assert torch.equal(torch.cat(parts, dim=1), whole), cut


@pytest.mark.parametrize("columns", [64, 576, 4096])
@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 3e-6), (torch.bfloat16, 1e-3), (torch.float16, 1e-3)])
def test_slices_leave_a_small_error_beside_an_outlier_of_300(kernel: Int8Kernel, columns: int, dtype: torch.dtype, allowed: float) -> None:
    _, weight, scale = make_integers(1, 128, columns)
    x = make_activations(4, columns).to(dtype)
    exact = weight.double() * scale.double()[:, None]
    expected = x.double() @ exact.T
    step = x.float().abs().amax(dim=1, keepdim=True) / 127
    one_slice = (x.float() / step).round() * step
    coarse = (one_slice.double() @ exact.T - expected).norm()
    error = (multiply(x, weight, scale, kernel).double() - expected).norm()
    assert error / expected.norm() < allowed
    assert error < coarse / 100  # each further slice counts in steps of 1 / 254 of the one before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_of_zeros_and_of_the_largest_values_stay_finite(kernel: Int8Kernel, dtype: torch.dtype) -> None:
    _, weight, scale = make_integers(1, 8, 48)
    x = torch.zeros((3, 48), dtype=dtype)
    x[1] = torch.finfo(dtype).tiny
    x[2, 5] = 60000
    found = multiply(x, weight, scale, kernel)
    assert found.dtype == torch.float32 and found.isfinite().all()
    assert torch.equal(found[0], torch.zeros(8))
    torch.testing.assert_close(found[2], float(x[2, 5]) * weight[:, 5].float() * scale, rtol=1e-5, atol=0)


def test_a_kernel_whose_products_saturate_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    def saturate(slices: torch.Tensor, packed: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        pairs = (slices[:, None] * packed[0].float()).unflatten(2, (-1, 2)).sum(3).clamp(-32768, 32767 - 300)
        return pairs.sum(2) * packed[1]

    monkeypatch.setattr(int8, "FBGEMM", Int8Kernel("saturating", PLAIN.pack, saturate))
    assert int8.choose_cpu_kernel.__wrapped__() is PLAIN


def test_a_kernel_that_the_processor_lacks_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(weight: torch.Tensor, scale: torch.Tensor) -> None:
        raise RuntimeError("Didn't find engine")

    monkeypatch.setattr(int8, "FBGEMM", Int8Kernel("absent", refuse, PLAIN.multiply))
    assert int8.choose_cpu_kernel.__wrapped__() is PLAIN


def test_an_exact_kernel_is_chosen_on_a_cpu_and_the_plain_one_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = Int8Kernel("exact", PLAIN.pack, PLAIN.multiply)
    monkeypatch.setattr(int8, "FBGEMM", exact)
    if "x86" in torch.backends.quantized.supported_engines:
        assert int8.choose_cpu_kernel.__wrapped__() is exact
    assert TorchBackend("cuda").int8_kernel is PLAIN
