"""The Triton backend on CPU tensors: its kernels run in Triton's interpreter, which tests/conftest.py turns on."""

import importlib.util
import threading
from typing import Any

import numpy as np
import pytest

from model.backends.interface import Backend

_ONE_AT_A_TIME = threading.Lock()
"""The interpreter keeps the place in the grid in a global; ranks of tests are threads."""


def build_interpreted_backend(monkeypatch: pytest.MonkeyPatch) -> Backend:
    """Build the Triton backend for CPU tensors; skip the test where triton is missing.

    The interpreter multiplies tiles with numpy, where the order of a sum depends on the element's place in the tile. No GPU does that, so
    products of floats are summed in the order of K here; products of integers are exact anyway, and faster in float64.
    """
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed: pip install triton")
    from triton.runtime import interpreter

    from model.backends.triton_backend import TritonBackend

    def multiply(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
        if a.data.dtype.kind in "iu":
            product = (a.data.astype(np.float64) @ b.data.astype(np.float64)).astype(np.int32)
        else:
            product = np.add.reduce(a.data.astype(np.float32)[:, :, None] * b.data.astype(np.float32)[None], axis=1)
        return interpreter.TensorHandle(product + d.data, d.dtype.scalar)

    run = interpreter.GridExecutor.__call__

    def run_alone(self: Any, *args: Any, **options: Any) -> None:
        with _ONE_AT_A_TIME:
            run(self, *args, **options)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", multiply)
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", run_alone)
    return TritonBackend("cpu")
