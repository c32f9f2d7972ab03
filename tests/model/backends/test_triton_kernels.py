"""The kernels for accelerators in Triton's interpreter, each against the plain operation: bit for bit where sums are of integers."""

import pytest
import torch

from model.backends.int8 import PLAIN, Int8Kernel
from model.backends.interface import Backend
from model.backends.self_check import check_backend
from tests.model.layers.test_quantized_linear import SCHEMES, build, make_inputs, make_stored

DTYPES = (torch.float32, torch.float16)
"""The interpreter computes bfloat16 wrongly; `scripts/bench/device_check.py` covers it on a GPU."""
TOLERANCES = {torch.float32: 2e-6, torch.float16: 1e-3}


def list_kernels(backend: Backend) -> tuple[Int8Kernel, Int8Kernel]:
    return PLAIN, backend.int8_kernel


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_integer_linears_have_the_bits_of_the_plain_ones(triton_backend: Backend, name: str, dtype: torch.dtype) -> None:
    stored = make_stored(name, 72)
    plain, own = (build(name, stored, kernel=kernel) for kernel in list_kernels(triton_backend))
    for rows in (1, 5):
        x = make_inputs(rows).to(dtype)
        assert torch.equal(own(x), plain(x))


def test_the_self_check_finds_nothing(triton_backend: Backend) -> None:
    assert check_backend(torch.device("cpu"), triton_backend, DTYPES) is None
