"""`tandem env`: the detected launch environment, versions, processor, kernels, accelerators and memory."""

import json
import os
import platform
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from launcher.environment.detection import read_cpu_kernels, read_environment
from launcher.host.accelerators import may_have_accelerator
from launcher.host.control_groups import read_memory_group
from launcher.host.cores import count_cores
from launcher.host.numa import format_cores, read_nodes
from launcher.host.program_version import read_version
from launcher.host.streams import require_stdout
from launcher.settings.measure_options import EnvOptions
from model.backends.device_types import NATIVE, TORCH
from model.kernels.instruction_set import read_processor_flags
from model.kernels.library import choose_kernels, find_kernels, list_kernels
from model.spec.quoting import quote_name
from parallel.lazy_torch import torch

_PACKAGES = ("torch", "numpy", "safetensors", "tokenizers", "sentencepiece", "huggingface_hub", "fastapi", "uvicorn")
_FEATURES = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "asimd", "asimddp", "i8mm", "bf16")
"""Instruction sets that the kernels use, by their Linux names."""


def show_environment(options: EnvOptions) -> None:
    """Print the report. Raises ConfigError for invalid launcher variables."""
    require_stdout("leave it open")
    environment: dict[str, Any] = asdict(read_environment())
    machine = describe_machine()
    if options.as_json:
        print(json.dumps({**environment, **machine}))
        return
    print("\n".join([*_list_environment(environment), "", *_list_machine(machine)]))


def describe_machine() -> dict[str, Any]:
    """Return versions, CPU, kernels, accelerators, memory and the limits of this process's control group; sizes in bytes."""
    group, memory = read_memory_group(), _read_memory()
    return {
        "versions": {"tandem": read_version(), "python": platform.python_version(), "system": platform.platform(), **_read_versions()},
        "cpu": {
            "model": read_processor(),
            "cores": os.cpu_count(),
            "usable_cores": count_cores(),
            "numa_nodes": {str(node): list(cores) for node, cores in read_nodes().items()},
            "features": _list_features(),
        },
        **_describe_backend(),
        "memory": {
            "total_bytes": memory.get("MemTotal"),
            "available_bytes": memory.get("MemAvailable"),
            "shm_bytes": _read_free("/dev/shm"),
        },
        "cgroup": {"memory_limit_bytes": group.limit_bytes, "oom_kills": group.num_kills},
    }


def read_processor() -> str:
    """Return the CPU's model name."""
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith("model name")).partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _describe_backend() -> dict[str, Any]:
    """Return the device and kernels that would run a model. Imports PyTorch only where it may find an accelerator or runs instead of the
    native kernels.
    """
    if find_spec("torch") is None:
        return {"backend": {"error": "PyTorch is not installed"}, "accelerators": []}
    choose_kernels(read_cpu_kernels() or "auto")
    kernels = find_kernels()  # of the device of --device auto
    try:
        accelerators = _list_accelerators() if may_have_accelerator() else []
        int8_kernel = kernels.int8_name if kernels is not None else _find_int8_kernel()
    except (ImportError, OSError) as error:
        return {"backend": {"error": f"PyTorch cannot be imported: {error}"}, "accelerators": []}
    return {
        "backend": {
            "device": "cpu",
            "kernels": TORCH if kernels is None else NATIVE,
            "int8_kernel": int8_kernel,
            "cpu_kernels": None if kernels is None else kernels.name,
            "cpu_kernels_usable": [kernels.name for kernels in list_kernels()],
        },
        "accelerators": accelerators,
    }


def _list_accelerators() -> list[str]:
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if device is not None and device.type == "cuda":
        return [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return [device.type] * torch.accelerator.device_count() if device is not None else []


def _find_int8_kernel() -> str:
    from model.backends.registry import find_backend  # with PyTorch

    return find_backend("cpu").int8_kernel.name


def _read_versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return versions


def _list_features() -> list[str]:
    return [feature for feature in _FEATURES if feature in read_processor_flags()]


def _read_memory() -> dict[str, int]:
    with suppress(OSError, ValueError, IndexError):
        rows = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
        return {row[0].rstrip(":"): int(row[1]) * 1024 for row in rows}
    return {}


def _read_free(folder: str) -> int | None:
    with suppress(OSError):
        found = os.statvfs(folder)
        return found.f_bavail * found.f_frsize
    return None


def _list_environment(found: dict[str, Any]) -> list[str]:
    found = dict(found)
    variables, sources = found.pop("variables"), found.pop("sources")
    width = max(map(len, found)) + 1
    lines = []
    for name, value in found.items():
        given = [(source, variables[source]) for source in sources[name].split(", ")] if name in sources else []
        origin = ", ".join(f"{source}={quote_name(text)}" for source, text in given)
        lines.append(f"{name + ':':<{width}} {'-' if value is None else quote_name(str(value))}{f' (from {origin})' if origin else ''}")
    return lines


def _list_machine(machine: dict[str, Any]) -> list[str]:
    versions, cpu, backend, memory = machine["versions"], machine["cpu"], machine["backend"], machine["memory"]
    installed = ", ".join(f"{name} {found or 'missing'}" for name, found in versions.items() if name != "system")
    runs = backend.get("error") or f"{backend['device']}, {backend['kernels']} kernels, {backend['int8_kernel']} for int8 weights"
    limit = machine["cgroup"]["memory_limit_bytes"]
    rows = {
        "versions": installed,
        "system": versions["system"],
        "cpu": f"{cpu['model']}, {cpu['usable_cores']} of {cpu['cores']} cores usable",
        "NUMA nodes": "; ".join(f"{node}: cores {format_cores(cores)}" for node, cores in cpu["numa_nodes"].items()),
        "cpu features": " ".join(cpu["features"]) or "-",
        "backend": runs,
        "cpu kernels": " ".join(backend.get("cpu_kernels_usable", ())) or "none (PyTorch's are used)",
        "accelerators": ", ".join(machine["accelerators"]) or "none",
        "memory": f"{_gigabytes(memory['available_bytes'])} available of {_gigabytes(memory['total_bytes'])}; "
        f"/dev/shm {_gigabytes(memory['shm_bytes'])} free",
        "cgroup limit": "none" if limit is None else _gigabytes(limit),
    }
    width = max(map(len, rows)) + 1
    return [f"{name + ':':<{width}} {text}" for name, text in rows.items()]


def _gigabytes(number: int | None) -> str:
    return "unknown" if number is None else f"{number / 1e9:.1f} GB"
