"""Registry of backends by device type. An unknown type raises an error that lists the known ones."""

import functools
import importlib.util

from model.backends.device_types import DEVICE_TYPES
from model.backends.interface import Backend
from model.backends.native_cpu import NativeCpuBackend
from model.backends.torch_backends import TorchBackend, TorchCpuBackend
from model.kernels.library import find_kernels
from parallel.errors import ConfigError


def find_backend(device_type: str) -> Backend:
    """Return the fastest backend of a device type on this machine. Raises ConfigError for an unknown type."""
    if device_type not in DEVICE_TYPES:
        raise ConfigError(f"device type {device_type!r} is unknown; supported: {', '.join(DEVICE_TYPES)}")
    if device_type == "cuda" and importlib.util.find_spec("triton") is not None:
        return _build_triton(device_type)
    if device_type != "cpu":
        return TorchBackend(device_type)
    kernels = find_kernels()
    return TorchCpuBackend() if kernels is None else NativeCpuBackend(kernels)


@functools.cache
def _build_triton(device_type: str) -> Backend:
    from model.backends.triton_backend import TritonBackend  # triton comes with PyTorch for GPUs only

    return TritonBackend(device_type)
