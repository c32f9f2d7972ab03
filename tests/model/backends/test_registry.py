"""The table of backends, and the native and PyTorch backends compared with each other."""

from typing import get_args

import pytest
import torch

from launcher.settings.options import Device
from model.backends.registry import DEVICE_TYPES, find_backend
from model.kernels.library import find_kernels, kernels_disabled
from parallel.errors import ConfigError


def test_an_unknown_device_type_is_refused_with_the_list() -> None:
    with pytest.raises(ConfigError, match=r"tpu.*cpu, cuda, npu"):
        find_backend("tpu")


def test_only_cpu_backends_keep_weights_in_host_memory() -> None:
    assert [find_backend(name).in_host_memory for name in DEVICE_TYPES] == [True, False, False]
    assert find_backend("cpu").open_device(3) == torch.device("cpu")


@pytest.mark.skipif(find_kernels() is None, reason="no native kernels on this machine")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_native_and_torch_operations_agree(dtype: torch.dtype) -> None:
    native = find_backend("cpu")
    with kernels_disabled():
        plain = find_backend("cpu")
    assert (native.name, plain.name) == ("native", "torch") and plain.kernels is None
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((5, 64), generator=generator).to(dtype)
    weight = torch.randn((32, 64), generator=generator).to(dtype)
    norm, delta = weight[0].clone(), torch.randn((5, 64), generator=generator).to(dtype)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(native.float_linear(x, weight), plain.float_linear(x, weight), **tolerance)
    found, expected = (backend.rms_norm(x.clone(), delta, norm, 1e-5) for backend in (native, plain))
    torch.testing.assert_close(found, expected, **tolerance)
    torch.testing.assert_close(native.silu_multiply(x), plain.silu_multiply(x), **tolerance)


def test_options_offer_the_device_types_of_the_registry() -> None:
    assert get_args(Device) == ("auto", *DEVICE_TYPES)
