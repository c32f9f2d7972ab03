"""Registers the pretend accelerator as PyTorch's `npu`, with the collectives `hccl`; called by `import torch` through an entry point.

Like NCCL, `hccl` takes tensors on the device only, and refuses two ranks on one device. Parts travel over gloo.
"""

import ctypes
import sys
from datetime import timedelta
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

_library = ctypes.CDLL(str(Path(__file__).with_name("libpretend_npu.so")))
_library.pretend_npu_counts.restype = ctypes.c_int64
_library.pretend_npu_counts.argtypes = (ctypes.c_char_p, ctypes.c_int64)


def read_counts() -> dict[str, int]:
    """Operators, copies and their bytes, and waits for a value, since the last `reset_counts`."""
    size = _library.pretend_npu_counts(None, 0)
    text = ctypes.create_string_buffer(size)
    _library.pretend_npu_counts(text, size)
    return {name: int(number) for name, number in (line.split("\t") for line in text.raw.decode().splitlines())}


class PretendHccl(dist.ProcessGroup):
    """A group of ranks, each with its own device."""

    def __init__(self, store: Any, rank: int, size: int, timeout: timedelta) -> None:
        super().__init__(rank, size)
        store.set(f"device/{rank}", _name_device(_library.pretend_npu_current_device()))
        devices = [store.get(f"device/{other}").decode() for other in range(size)]
        if len(set(devices)) < size:
            raise RuntimeError(f"two ranks use one device: {devices}")
        self._inner = dist.ProcessGroupGloo(store, rank, size, timeout)

    def allgather(self, outputs: Any, inputs: Any, opts: Any = None) -> Any:
        """Gather lists of tensors."""
        for row, sent in zip(outputs, inputs, strict=True):
            self._gather(row, sent)
        return _finished(outputs)

    def all_gather_single(self, output: torch.Tensor, sent: torch.Tensor, opts: Any = None) -> Any:
        """Gather into one tensor [ranks * rows, ...]."""
        self._gather(list(output.view(self.size(), -1)), sent.view(-1))
        return _finished(output)

    def _gather(self, received: list[torch.Tensor], sent: torch.Tensor) -> None:
        for tensor in (*received, sent):
            if tensor.device.type != "npu":
                raise RuntimeError(f"hccl takes tensors on the device, not on {tensor.device}")
        parts = [torch.empty(tensor.shape, dtype=tensor.dtype) for tensor in received]
        self._inner.allgather([parts], [sent.cpu()]).wait()
        for tensor, part in zip(received, parts, strict=True):
            tensor.copy_(part)

    def getBackendName(self) -> str:
        """Name as in init_process_group."""
        return "hccl"

    @property
    def group_name(self) -> str:
        """Name of the group."""
        return "hccl"


def _name_device(index: int) -> str:
    """A name that is the same in all processes of the host."""
    return f"pretend-{_library.pretend_npu_first_device() + index}"


def _finished(result: Any) -> Any:
    future: torch.futures.Future[Any] = torch.futures.Future()
    future.set_result(result)
    return torch._C._distributed_c10d._create_work_from_future(future)


def autoload() -> None:
    """Register device and collectives."""
    torch.utils.rename_privateuse1_backend("npu")
    _library.pretend_npu_register()
    module = ModuleType("torch.npu")
    functions = {
        "is_available": lambda: _library.pretend_npu_device_count() > 0,
        "is_initialized": lambda: True,
        "device_count": _library.pretend_npu_device_count,
        "current_device": _library.pretend_npu_current_device,
        "set_device": lambda device: _library.pretend_npu_set_device(device if isinstance(device, int) else torch.device(device).index),
        "synchronize": lambda device=None: _library.pretend_npu_synchronize(),
        "get_device_properties": lambda device: SimpleNamespace(name="pretend NPU", uuid=_name_device(device)),
        "manual_seed_all": lambda seed: None,
        "_is_in_bad_fork": lambda: False,
        "read_counts": read_counts,
        "reset_counts": _library.pretend_npu_reset_counts,
    }
    for name, function in functions.items():
        setattr(module, name, function)
    torch._register_device_module("npu", module)
    sys.modules["torch.npu"] = module
    torch.utils.generate_methods_for_privateuse1_backend(for_tensor=True, for_module=False, for_storage=False)
    dist.Backend.register_backend("hccl", PretendHccl, devices=["npu"])
