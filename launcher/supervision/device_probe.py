"""Looks at the accelerators of this host. A driver takes memory and threads, so the parent of a run has a child of the starter look."""

import os
import sys
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

from launcher.job.device_facts import DeviceFacts
from model.backends.device_types import TORCH

if TYPE_CHECKING:
    import torch

_SELF_CHECK = "model.backends.self_check"


def read_devices(local_rank: int | None = None, *, checks: bool) -> DeviceFacts:
    """Look at all visible devices, or at the one of a rank. `checks`: run the self-check of their backend too."""
    import torch

    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    count = 0 if device is None else torch.accelerator.device_count()
    if device is None or not count:
        return DeviceFacts(kind=None)
    indices = range(count) if local_rank is None else (local_rank % count,)
    memory = [torch.accelerator.get_memory_info(index) for index in indices]
    return DeviceFacts(
        kind=device.type,
        count=count,
        free_bytes=tuple(free for free, _ in memory),
        total_bytes=tuple(total for _, total in memory),
        complaint=_check_backend(torch.device(device.type, indices[0])) if checks else None,
    )


def _check_backend(device: "torch.device") -> str | None:
    from model.backends.registry import find_backend

    if find_spec(_SELF_CHECK) is None or find_backend(device.type).name == TORCH:
        return f"its backend is not made for {device.type} but for any device of PyTorch, and slow"
    complaint: str | None = import_module(_SELF_CHECK).check_backend(device)
    return complaint


def write_devices(descriptor: int, *, checks: bool) -> None:
    """Write the facts to a file, or why the devices cannot be used, and raise that error."""
    try:
        os.write(descriptor, read_devices(checks=checks).to_json().encode())
    except Exception as error:  # whatever a driver raises
        os.write(descriptor, f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}".encode())
        raise


def main() -> None:
    """Run in a new interpreter, with two arguments: DESCRIPTOR check|look."""
    write_devices(int(sys.argv[1]), checks=sys.argv[2] == "check")
