"""Whether this host can have an accelerator at all: a question that PyTorch would answer only after its import."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

_NODES = ("nvidia*", "nvgpu*", "nvhost*", "dxg", "kfd", "davinci*")
"""Device files of drivers: NVIDIA's, also on Jetson and under WSL, AMD's and Ascend's."""


def is_cpu_build() -> bool:
    """Return whether the installed PyTorch names itself a build for the CPU only; False if there is none."""
    from importlib.metadata import PackageNotFoundError, version  # only here: it takes a twentieth of a refusal

    try:
        return version("torch").endswith("+cpu")
    except PackageNotFoundError:
        return False


def may_have_accelerator(dev: Path = Path("/dev"), plugins: Sequence[str] = ("torch_npu",)) -> bool:
    """Return False if PyTorch cannot find an accelerator here: its build supports the CPU only, or no driver has made a device file.

    True leaves the question to PyTorch, as does any of `plugins`: these packages add devices, whatever the build is.
    """
    if any(find_spec(plugin) is not None for plugin in plugins):
        return True
    return not is_cpu_build() and any(next(dev.glob(pattern), None) is not None for pattern in _NODES)
