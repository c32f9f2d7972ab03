"""Every launch of the Triton backend, compiled ahead of time for GPUs that need not be there."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT_ROOT = Path(__file__).resolve().parents[3]
KERNELS = {
    "add_and_normalize", "attend_tiles", "combine_chunks", "finish_split", "float_product", "int4_product", "int8_product",
    "rotate_and_write", "silu_product", "slice_rows",
}  # fmt: skip
MULTIPLYING = {"attend_tiles", "float_product", "int4_product", "int8_product"}
SHARED_BYTES = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
"""Shared memory that a block may have, by compute capability (CUDA's programming guide)."""


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED_BYTES)
def test_every_kernel_compiles_without_approximate_arithmetic(capability: int, tmp_path: Path) -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed: pip install triton")
    command = [sys.executable, str(Path(__file__).with_name("compile_kernels.py")), str(capability)]
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(PROJECT_ROOT)}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=540)
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert {one["kernel"] for one in found} == KERNELS
    assert [one for one in found if one["inexact"]] == []
    assert max(one["shared"] for one in found) <= SHARED_BYTES[capability]
    assert {one["kernel"] for one in found if one["mma"]} == MULTIPLYING
    # A product and a sum in one instruction are rounded once: only float32 tiles, which have no instruction of their own, may be summed so.
    assert {one["kernel"] for one in found if one["fma"]} <= {"attend_tiles", "float_product"}
