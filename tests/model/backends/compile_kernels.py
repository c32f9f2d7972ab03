"""Compiles every kernel of the Triton backend for GPUs that need not be there; run by test_triton_compilation.py in its own process.

Each operation is called on CPU tensors in shapes of real models, and its launches are compiled as the GPU's driver would, instead of run.
"""

import json
import sys
import time
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from model.backends.int8 import InputSteps
from model.backends.paged import StoredLayer, place_rows
from model.backends.triton_backend import TritonBackend
from model.backends.triton_kernels.int8_linear import multiply_int8

KINDS = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int8: "i8", torch.uint8: "u8", torch.int32: "i32"}


def list_launches() -> dict[str, tuple[JITFunction[Any], tuple[Any, ...], dict[str, Any]]]:
    """Call every operation and return one launch of each kind: (kernel, arguments, constants and options)."""
    launches: dict[str, tuple[JITFunction[Any], tuple[Any, ...], dict[str, Any]]] = {}

    def record(self: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        described = json.dumps([self.__name__, describe(args), options], sort_keys=True, default=str)
        launches.setdefault(described, (self, args, options))

    JITFunction.run = record
    backend = TritonBackend("cpu")
    linears = backend.int8_kernel.linears
    assert linears is not None
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for rows in (1, 100) if dtype == torch.bfloat16 else (1,):
            x = torch.zeros((rows, 4096), dtype=dtype)
            backend.rms_norm(x, x.clone(), torch.ones(4096, dtype=dtype), 1e-5)
            backend.silu_multiply(x)
            backend.float_linear(x, torch.zeros((512, 4096), dtype=dtype))
            weight = torch.zeros((512, 4096), dtype=torch.int8)
            for bits, groups in ((8, 1), (8, 32), (4, 32)):
                packed = linears.pack(weight, torch.ones((512, groups)), [4096 // groups] * groups, bits, InputSteps())
                linears.multiply(x, packed, dtype)
    x = torch.zeros((1, 4096), dtype=torch.bfloat16)
    ordered = InputSteps(order=torch.randperm(4096), divisor=None)
    for steps in (InputSteps("token"), InputSteps("tensor", divisor=torch.ones(4096), correction=torch.ones(512)), ordered):
        linears.multiply(x, linears.pack(weight, torch.ones((512, 1)), [4096], 8, steps), torch.bfloat16)
    q = torch.zeros((2, 1, 4096), dtype=torch.int8)
    multiply_int8(q, torch.ones(1), weight, torch.ones((512, 1)), None, torch.bfloat16, split=4)
    for dtype, dim, heads, kv_heads, softcap in (
        (torch.bfloat16, 128, 64, 8, None),
        (torch.float16, 64, 32, 32, 50.0),
        (torch.float32, 96, 4, 4, None),
    ):
        for quantized in (False, True, "token"):
            for count in (1, 100):
                data = torch.zeros((20, 2, kv_heads, 16, dim), dtype=torch.int8 if quantized else dtype)
                scales = torch.ones((20, 2, kv_heads, 16)) if quantized == "token" else None
                layer = StoredLayer(data, scales, torch.ones((2, kv_heads, 1, dim)) if quantized is True else None)
                tile = backend.paged_attention.tokens_per_tile(heads, kv_heads)
                paged = place_rows([(20, count, list(range(20)))], tile, 16, torch.device("cpu"))
                qkv = torch.zeros((count, (heads + 2 * kv_heads) * dim), dtype=dtype)
                angles = torch.zeros((count, 1, dim)), torch.zeros((count, 1, dim))
                backend.paged_attention.attend(qkv, heads, kv_heads, angles, layer, paged, None, softcap)
    return launches


def describe(args: tuple[Any, ...]) -> list[str]:
    """Types of arguments as Triton names them; numbers divisible by 16 and the number 1 are compiled apart."""
    return [
        "*" + KINDS[arg.dtype] if isinstance(arg, torch.Tensor) else "fp32" if isinstance(arg, float)
        else "1" if arg == 1 else "i32:16" if arg % 16 == 0 else "i32"
        for arg in args
    ]  # fmt: skip


def compile_for(capability: int, launch: tuple[JITFunction[Any], tuple[Any, ...], dict[str, Any]]) -> dict[str, Any]:
    """Compile one launch and return what the GPU would need for it."""
    kernel, args, options = launch
    names, kinds = kernel.arg_names, describe(args)
    constants = {(names.index(name),): value for name, value in options.items() if name in names}
    signature, attributes = {name: "constexpr" for name in names}, {}
    for place, (name, kind) in enumerate(zip(names, kinds, strict=False)):
        if (place,) in constants:
            continue
        if kind == "1":
            constants[place,] = 1
            continue
        signature[name] = kind.removesuffix(":16")
        if kind.startswith("*") or kind.endswith(":16"):
            attributes[place,] = [["tt.divisibility", 16]]
    for place, param in enumerate(kernel.params[: len(args)]):
        if param.is_constexpr:
            constants[place,], signature[param.name] = args[place], "constexpr"
            attributes.pop((place,), None)
    source = ASTSource(kernel, signature, constants, attributes)
    launch_options = {name: value for name, value in options.items() if name not in names}
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch_options)
    return {"kernel": kernel.__name__, "shared": built.metadata.shared, "ptx": built.asm["ptx"]}


def main() -> None:
    """Print one JSON line per capability and kernel."""
    launches = list_launches()
    for capability in map(int, sys.argv[1:]):
        for launch in launches.values():
            started = time.monotonic()
            found = compile_for(capability, launch)
            ptx = found.pop("ptx")
            found |= {"capability": capability, "seconds": round(time.monotonic() - started, 2), "mma": "mma" in ptx}
            found["fma"] = "fma.rn.f32" in ptx
            found["inexact"] = [word for word in ("div.full", "div.approx", "tf32") if word in ptx]
            print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
