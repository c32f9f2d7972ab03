"""The native kernels (`model/kernels/`), if the package was built with them and the CPU supports them.

Each output row depends only on its own inputs, accumulated in a fixed order: not on the batch, the threads or the ranks. Without the
kernels, PyTorch does the same more slowly; `model/backends/registry.py` chooses.
"""

import ctypes
import functools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import torch

_INTERFACE = 3
"""Interface version, as in model/kernels/supported.c."""
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Type codes, as in model/kernels/vectors.h."""
_MAX_COLUMNS = (1 << 31) // (255 * 128)
"""More columns could overflow the 32-bit accumulators."""
_NEEDED_FLAGS = {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni", "avx512_bf16"}
"""CPU flags that `tandem_supported` requires, by their Linux names."""
_POINTER, _SIZE, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_float
_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "tandem_interface": (_INT, []),
    "tandem_supported": (_INT, []),
    "tandem_int8_linear": (
        _INT,
        [_POINTER, _INT, _SIZE, _SIZE, _POINTER, _SIZE, *[_POINTER] * 2, *[_SIZE] * 2, _POINTER, _INT, _SIZE, _INT],
    ),
    "tandem_float_linear": (None, [_POINTER, _INT, _SIZE, _SIZE, _POINTER, _SIZE, _POINTER, _SIZE, _INT]),
    "tandem_rms_norm": (None, [_POINTER, _POINTER, _POINTER, _POINTER, _INT, _SIZE, _SIZE, _FLOAT, _INT]),
    "tandem_silu_multiply": (None, [_POINTER, _POINTER, _INT, _SIZE, _SIZE, _INT]),
    "tandem_layers": (_INT, [_POINTER, _SIZE, _SIZE, _POINTER, _POINTER]),
    "tandem_attend": (
        _INT,
        [_POINTER, _INT, *[_SIZE] * 4, *[_POINTER] * 5, _SIZE, _POINTER, _SIZE, _POINTER, _POINTER, _INT],
    ),
}


class Kernels:
    """The C functions, on contiguous CPU tensors. Each call uses PyTorch's number of threads."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments

    @property
    def run_layers(self) -> Any:
        """Run whole layers, see `model/decoder/fused_layers.py`."""
        return self._library.tandem_layers

    @property
    def is_usable(self) -> bool:
        """Return whether the library was built from these sources and this CPU can run it."""
        return bool(self._library.tandem_interface() == _INTERFACE and self._library.tandem_supported())

    def int8_linear(
        self, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, starts: torch.Tensor, num_slices: int, dtype: torch.dtype
    ) -> torch.Tensor:
        """Multiply x [tokens, columns] by int8 weight [rows, columns] with scale [rows, groups]: [tokens, rows] as `dtype`.

        `starts` int64 [groups + 1]: first column of each group. `num_slices`: number of 8-bit slices per element of x
        (`model/backends/int8.py`); 0: x is already int8.
        """
        x = x.contiguous()
        tokens, columns = x.shape
        assert columns <= _MAX_COLUMNS, columns
        out = torch.empty((tokens, weight.shape[0]), dtype=dtype)
        kind = DTYPES[x.dtype] if num_slices else 0
        failed = self._library.tandem_int8_linear(
            x.data_ptr(), kind, tokens, columns, weight.data_ptr(), weight.shape[0], scale.data_ptr(), starts.data_ptr(),
            starts.shape[0] - 1, num_slices, out.data_ptr(), DTYPES[dtype], out.shape[1], torch.get_num_threads(),
        )  # fmt: skip
        return _check(failed, out)

    def float_linear(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Multiply x [tokens, columns] by weight [rows, columns] of the same dtype."""
        x = x.contiguous()
        out = torch.empty((x.shape[0], weight.shape[0]), dtype=x.dtype)
        self._library.tandem_float_linear(
            x.data_ptr(),
            DTYPES[x.dtype],
            *x.shape,
            weight.data_ptr(),
            weight.shape[0],
            out.data_ptr(),
            out.shape[1],
            torch.get_num_threads(),
        )
        return out

    def rms_norm(self, hidden: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """RMSNorm of hidden [tokens, size], to which `delta` is added in place first."""
        out = torch.empty_like(hidden)
        added = None if delta is None else delta.contiguous().data_ptr()
        self._library.tandem_rms_norm(
            hidden.data_ptr(), added, weight.data_ptr(), out.data_ptr(), DTYPES[hidden.dtype], *hidden.shape, eps, torch.get_num_threads()
        )
        return out

    def silu_multiply(self, gate_up: torch.Tensor) -> torch.Tensor:
        """Multiply silu of the first half of each row by the second half: [tokens, 2 size] to [tokens, size]."""
        tokens, size = gate_up.shape[0], gate_up.shape[1] // 2
        out = torch.empty((tokens, size), dtype=gate_up.dtype)
        threads = torch.get_num_threads()
        self._library.tandem_silu_multiply(gate_up.data_ptr(), out.data_ptr(), DTYPES[gate_up.dtype], tokens, size, threads)
        return out

    def attend(
        self,
        qkv: torch.Tensor,
        heads: int,
        kv_heads: int,
        angles: tuple[torch.Tensor, torch.Tensor],
        data: torch.Tensor,
        token_scales: torch.Tensor | None,
        fixed_scales: torch.Tensor | None,
        spans: torch.Tensor,
        blocks: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        """Apply rotary embedding, append to the KV cache, and attend; changes qkv [tokens, (heads + 2 kv_heads) * head_dim]. out is
        [tokens, heads * head_dim].

        `data`, `token_scales`: one layer of a KeyValueStore; `spans` and `blocks`: see `model/layers/attention.py`.
        """
        block_size, head_dim = data.shape[-2:]
        failed = self._library.tandem_attend(
            qkv.data_ptr(), DTYPES[qkv.dtype], qkv.shape[0], heads, kv_heads, head_dim, angles[0].data_ptr(), angles[1].data_ptr(),
            data.data_ptr(), None if token_scales is None else token_scales.data_ptr(),
            None if fixed_scales is None else fixed_scales.data_ptr(), block_size,
            spans.data_ptr(), spans.shape[0], blocks.data_ptr(), out.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        _check(failed, out)


def explain_absence() -> str | None:
    """Explain what to do if this CPU supports the kernels but they are missing; None if they are present or cannot be used anyway."""
    if find_kernels() is not None or not _NEEDED_FLAGS <= _read_processor_flags():
        return None
    return "the package was installed without its own kernels, which this processor could run: with a C compiler, install it again"


def _read_processor_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return set()
    return set(next((line for line in lines if line.startswith("flags")), "").split())


_disabled = False


def find_kernels() -> Kernels | None:
    """Return the kernels for CPU tensors; None if they are not built, built from other sources, or not supported by this CPU."""
    return None if _disabled else _load()


@contextmanager
def kernels_disabled() -> Iterator[None]:
    """Disable native kernels for models built in this context, to compare both paths."""
    global _disabled
    before, _disabled = _disabled, True
    try:
        yield
    finally:
        _disabled = before


@functools.cache
def _load() -> Kernels | None:
    for suffix in EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(f"_kernels{suffix}")
        if path.exists():
            try:
                kernels = Kernels(ctypes.CDLL(str(path)))
            except (OSError, AttributeError) as error:
                warnings.warn(f"{path.name} cannot be used and PyTorch's slower products are: {error}; install again", stacklevel=2)
                return None
            return kernels if kernels.is_usable else None
    return None


def _check(failed: int, out: torch.Tensor) -> torch.Tensor:
    if failed:
        raise MemoryError("a kernel found no memory for its work space")
    return out
