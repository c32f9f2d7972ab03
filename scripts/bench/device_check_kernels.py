"""The checks of `device_check.py` on single kernels: bits against the CPU's, bits over splits and batches, bandwidth by shape."""

import platform
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from model.backends.int8 import InputSteps
from model.backends.registry import find_backend
from model.backends.self_check import check_backend

SHAPES = {
    "70B qkv": (10240, 8192), "70B o": (8192, 8192), "70B gate_up": (57344, 8192), "70B down": (8192, 28672),
    "7B qkv": (12288, 4096), "7B o": (4096, 4096), "7B gate_up": (22016, 4096), "7B down": (4096, 11008),
}  # fmt: skip
"""(rows, columns) of the linears of Llama 2."""
DEVICE = torch.device("cuda", 0)


def clock(run: Callable[[], Any], times: int = 20) -> float:
    """Return the median seconds of a call on the GPU."""
    for _ in range(3):
        run()
    seconds = []
    for _ in range(times):
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        before.record()
        run()
        after.record()
        after.synchronize()
        seconds.append(before.elapsed_time(after) / 1e3)
    return sorted(seconds)[times // 2]


def environment() -> dict[str, Any]:
    """Where this runs."""
    import triton

    found = torch.cuda.get_device_properties(DEVICE)
    return {
        "gpu": found.name, "gigabytes": found.total_memory / 1e9, "capability": f"{found.major}.{found.minor}",
        "torch": torch.__version__, "triton": triton.__version__, "python": platform.python_version(),
    }  # fmt: skip


def bits_of_the_cpu() -> dict[str, Any]:
    """The self-check: integer linears have the CPU's bits, floats come near and keep theirs."""
    difference = check_backend(DEVICE)
    return {"every operation": "right" if difference is None else f"NO: {difference}"}


def measure_copy() -> float:
    """Return the bytes a second that the GPU reads and writes, by copying 4 GB."""
    source = torch.empty(1 << 31, dtype=torch.int8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.numel() / clock(lambda: target.copy_(source), 10)


def bandwidth() -> dict[str, Any]:
    """GB/s of weights in each shape, int8 of ours beside bfloat16 of cuBLAS, at 1, 8 and 64 rows."""
    linears, found = find_backend("cuda").int8_kernel.linears, {"copy GB/s": measure_copy() / 1e9}
    assert linears is not None
    for name, (rows, columns) in SHAPES.items():
        weight = torch.randint(-128, 128, (rows, columns), dtype=torch.int8, device=DEVICE)
        packed = linears.pack(weight, torch.rand((rows, 1), device=DEVICE), [columns], 8, InputSteps())
        wide = torch.randn((rows, columns), dtype=torch.bfloat16, device=DEVICE)
        for tokens in (1, 8, 64):
            x = torch.randn((tokens, columns), device=DEVICE).bfloat16()
            own = clock(lambda x=x, packed=packed: linears.multiply(x, packed, torch.bfloat16))
            cublas = clock(lambda x=x, wide=wide: F.linear(x, wide))
            found[f"{name} x {tokens}"] = {"int8": weight.numel() / own / 1e9, "cuBLAS bf16": 2 * weight.numel() / cublas / 1e9}
    return found


def cublas_bits_over_rows() -> dict[str, Any]:
    """Share of elements that change when cuBLAS gets a rank's rows, or one token of several: why the kernels are ours."""
    found: dict[str, Any] = {}
    for name in ("70B o", "7B down"):
        rows, columns = SHAPES[name]
        weight = torch.randn((rows, columns), dtype=torch.bfloat16, device=DEVICE)
        for tokens in (1, 4, 17, 512):
            x = torch.randn((tokens, columns), dtype=torch.bfloat16, device=DEVICE)
            whole = F.linear(x, weight)
            row = {
                f"{n} ranks": float((torch.cat([F.linear(x, part) for part in weight.chunk(n)], 1) != whole).float().mean())
                for n in (2, 4, 8)
            }
            found[f"{name} x {tokens}"] = {**row, "alone": float((F.linear(x[:1], weight) != whole[:1]).float().mean())}
    return found


def own_bits_over_rows() -> dict[str, Any]:
    """Whether the float product keeps its bits over splits of the weight's rows and over batches, for every dtype."""
    backend, found = find_backend("cuda"), dict[str, Any]()
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        weight = torch.randn((4096, 4096), dtype=dtype, device=DEVICE)
        x = torch.randn((512, 4096), dtype=dtype, device=DEVICE)
        whole = backend.float_linear(x, weight)
        kept = {
            f"{n} ranks": torch.equal(torch.cat([backend.float_linear(x, part) for part in weight.chunk(n)], 1), whole) for n in (2, 3, 8)
        }
        for tokens in (1, 5, 17, 64):
            kept[f"{tokens} of 512 rows"] = torch.equal(backend.float_linear(x[:tokens].contiguous(), weight), whole[:tokens])
        found[str(dtype).removeprefix("torch.")] = kept
    return found


KERNEL_CHECKS = {
    "environment": environment,
    "bits of the CPU": bits_of_the_cpu,
    "own bits over rows": own_bits_over_rows,
    "cuBLAS bits over rows": cublas_bits_over_rows,
    "bandwidth": bandwidth,
}
"""By the name in the table."""
