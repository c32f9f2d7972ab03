"""What is known of a device type without its backend, and so without PyTorch."""

from importlib.util import find_spec

DEVICE_TYPES = ("cpu", "cuda", "npu")
"""Device types that a run may name."""
NATIVE, TORCH = "native", "torch"
"""Names of the two kinds of backends: with native kernels, and with PyTorch's."""


def keeps_integers_packed(device_type: str) -> bool:
    """Return whether 4-bit weights stay packed on an accelerator: Triton's kernels unpack them."""
    return device_type == "cuda" and find_spec("triton") is not None


def is_host_memory(device_type: str) -> bool:
    """Return whether weights and KV cache are in host memory, so that host limits apply and ranks can share memory."""
    return device_type == "cpu"
