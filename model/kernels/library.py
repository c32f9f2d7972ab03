"""The native kernels (`model/kernels/`): one library per instruction set, of those that the package was built with and the CPU supports.

Each output row depends only on its own inputs, accumulated in a fixed order: not on the batch, the threads or the ranks. Without the
kernels, PyTorch does the same more slowly; `model/backends/registry.py` chooses.
"""

from __future__ import annotations

import ctypes
import functools
import platform
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

from model.kernels.instruction_set import INSTRUCTION_SETS, InstructionSet, read_processor_flags
from model.spec.linear_memory import STEP_BYTES, STEP_COLUMNS, TILE_ROWS
from parallel.errors import ConfigError
from parallel.lazy_torch import torch
from parallel.shared_words import WordAccess

_INTERFACE = 7
"""Interface version, as in model/kernels/supported.c."""


class _TypeCodes(dict[Any, int]):
    """Codes by torch.dtype, filled as they are asked for: naming the types here would import PyTorch."""

    def __missing__(self, dtype: torch.dtype) -> int:
        self[dtype] = code = ("float32", "bfloat16", "float16").index(str(dtype).removeprefix("torch."))
        return code


DTYPES = _TypeCodes()
"""Type codes, as in model/kernels/vectors.h."""
_MAX_COLUMNS = (1 << 31) // (255 * 128)
"""More columns could overflow the 32-bit accumulators."""
_POINTER, _SIZE, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_float
_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "tandem_interface": (_INT, []),
    "tandem_supported": (_INT, []),
    "tandem_load_word": (ctypes.c_int64, [_POINTER]),
    "tandem_store_word": (None, [_POINTER, ctypes.c_int64]),
    "tandem_int8_linear": (
        _INT,
        [_POINTER, _INT, _SIZE, _SIZE, _POINTER, _SIZE, *[_POINTER] * 2, _SIZE, *[_POINTER] * 2, _INT, _SIZE, _INT],
    ),
    "tandem_int4_linear": (
        _INT,
        [_POINTER, _INT, _SIZE, _SIZE, _POINTER, _SIZE, *[_POINTER] * 3, _SIZE, *[_POINTER] * 2, _INT, _SIZE, _INT],
    ),
    "tandem_pack_int4": (_INT, [_POINTER, _SIZE, _SIZE, _POINTER, _SIZE, _POINTER, _POINTER, _INT]),
    "tandem_float_linear": (None, [_POINTER, _INT, _SIZE, _SIZE, _POINTER, _SIZE, _POINTER, _SIZE, _INT]),
    "tandem_rms_norm": (None, [_POINTER, _POINTER, _POINTER, _POINTER, _INT, _SIZE, _SIZE, _FLOAT, _INT]),
    "tandem_silu_multiply": (None, [_POINTER, _POINTER, _INT, _SIZE, _SIZE, _INT]),
    "tandem_layers": (_INT, [_POINTER, _SIZE, _SIZE, _POINTER, _POINTER]),
    "tandem_attend": (
        _INT,
        [_POINTER, _INT, *[_SIZE] * 4, *[_POINTER] * 5, _SIZE, _POINTER, _SIZE, _POINTER, _SIZE, _FLOAT, _POINTER, _INT],
    ),
}


class KernelInputs(ctypes.Structure):
    """What is done to the inputs of an integer linear before they are multiplied (model/kernels/kernels.h)."""

    _fields_ = (
        ("num_slices", _SIZE),
        ("divisor", _POINTER),
        ("order", _POINTER),
        ("scale", _FLOAT),
        ("zero_point", _FLOAT),
        ("correction", _POINTER),
    )


@dataclass(frozen=True, slots=True)
class PackedInt4:
    """A 4-bit weight [rows, columns], packed in tiles of 16 rows (model/kernels/int4_linear.c)."""

    packed: torch.Tensor
    """uint8 [tiles, steps, 64]."""
    scale: torch.Tensor
    """float32 [tiles, groups, 16]."""
    zeros: torch.Tensor
    """int8 [tiles, groups, 16]."""
    starts: torch.Tensor
    """int64 [groups + 1]: first column of each group."""
    rows: int
    """Number of rows."""


class Kernels:
    """The C functions, on contiguous CPU tensors. Each call uses PyTorch's number of threads."""

    def __init__(self, library: ctypes.CDLL, instruction_set: InstructionSet) -> None:
        self._library, self.instruction_set = library, instruction_set
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments

    @property
    def name(self) -> str:
        """Name of the instruction set."""
        return self.instruction_set.name

    @property
    def int8_name(self) -> str:
        """Name of the int8 matmul in stats."""
        return f"int8-sliced-{self.name}"

    @property
    def run_layers(self) -> Any:
        """Run whole layers, see `model/decoder/fused_layers.py`."""
        return self._library.tandem_layers

    @property
    def word_access(self) -> WordAccess:
        """Ordered access to words of memory that processes share."""
        return WordAccess(self._library.tandem_load_word, self._library.tandem_store_word)

    @property
    def is_usable(self) -> bool:
        """Return whether the library was built from these sources and this CPU can run it."""
        return bool(self._library.tandem_interface() == _INTERFACE and self._library.tandem_supported())

    def int8_linear(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        scale: torch.Tensor,
        starts: torch.Tensor,
        inputs: KernelInputs | int,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """Multiply x [tokens, columns] by int8 weight [rows, columns] with scale [rows, groups]: [tokens, rows] as `dtype`.

        `starts` int64 [groups + 1]: first column of each group. `inputs`: the number of 8-bit slices per element of x
        (`model/backends/int8.py`), or also what is done to x before; without slices, x is int8.
        """
        x = x.contiguous()
        tokens, columns = x.shape
        assert columns <= _MAX_COLUMNS, columns
        out = torch.empty((tokens, weight.shape[0]), dtype=dtype)
        inputs = inputs if isinstance(inputs, KernelInputs) else KernelInputs(inputs)
        kind = DTYPES[x.dtype] if inputs.num_slices else 0
        failed = self._library.tandem_int8_linear(
            x.data_ptr(), kind, tokens, columns, weight.data_ptr(), weight.shape[0], scale.data_ptr(), starts.data_ptr(),
            starts.shape[0] - 1, ctypes.addressof(inputs), out.data_ptr(), DTYPES[dtype], out.shape[1], torch.get_num_threads(),
        )  # fmt: skip
        return _check(failed, out)

    def int4_linear(self, x: torch.Tensor, weight: PackedInt4, inputs: KernelInputs | int, dtype: torch.dtype) -> torch.Tensor:
        """Multiply x [tokens, columns] by a packed weight: [tokens, rows] as `dtype`. `inputs`: as for int8_linear; no correction."""
        x = x.contiguous()
        tokens, columns = x.shape
        out = torch.empty((tokens, weight.rows), dtype=dtype)
        inputs = inputs if isinstance(inputs, KernelInputs) else KernelInputs(inputs)
        kind = DTYPES[x.dtype] if inputs.num_slices else 0
        failed = self._library.tandem_int4_linear(
            x.data_ptr(), kind, tokens, columns, weight.packed.data_ptr(), weight.rows, weight.scale.data_ptr(), weight.zeros.data_ptr(),
            weight.starts.data_ptr(), weight.starts.shape[0] - 1, ctypes.addressof(inputs), out.data_ptr(), DTYPES[dtype], out.shape[1],
            torch.get_num_threads(),
        )  # fmt: skip
        return _check(failed, out)

    def pack_int4(self, weight: torch.Tensor, scale: torch.Tensor, starts: torch.Tensor) -> PackedInt4 | None:
        """Pack weight int8 [rows, columns] with scale float32 [rows, groups]; None if the integers of a row and group span over 4 bits."""
        weight = weight.contiguous()
        (rows, columns), groups = weight.shape, starts.shape[0] - 1
        tiles, steps = -(-rows // TILE_ROWS), sum(-(-size // STEP_COLUMNS) for size in starts.diff().tolist())
        packed = torch.empty((tiles, steps, STEP_BYTES), dtype=torch.uint8)
        zeros = torch.empty((tiles, groups, TILE_ROWS), dtype=torch.int8)
        if self._library.tandem_pack_int4(
            weight.data_ptr(), rows, columns, starts.data_ptr(), groups, packed.data_ptr(), zeros.data_ptr(), torch.get_num_threads()
        ):
            return None
        scales = torch.zeros((tiles * TILE_ROWS, groups))
        scales[:rows] = scale
        scales = scales.view(tiles, TILE_ROWS, groups).transpose(1, 2).contiguous()
        return PackedInt4(packed, scales, zeros, starts, rows)

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
        limits: tuple[int, float],
        out: torch.Tensor,
    ) -> None:
        """Apply rotary embedding, append to the KV cache, and attend; changes qkv [tokens, (heads + 2 kv_heads) * head_dim]. out is
        [tokens, heads * head_dim].

        `data`, `token_scales`: one layer of a KeyValueStore for kernels; `spans` and `blocks`: see `model/layers/batch.py`;
        `limits`: the window in tokens and the limit of the scores, 0 for none.
        """
        block_size, head_dim = data.shape[-2:]
        window, softcap = limits
        failed = self._library.tandem_attend(
            qkv.data_ptr(), DTYPES[qkv.dtype], qkv.shape[0], heads, kv_heads, head_dim, angles[0].data_ptr(), angles[1].data_ptr(),
            data.data_ptr(), None if token_scales is None else token_scales.data_ptr(),
            None if fixed_scales is None else fixed_scales.data_ptr(), block_size,
            spans.data_ptr(), spans.shape[0], blocks.data_ptr(), window, softcap, out.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        _check(failed, out)


def explain_absence() -> str | None:
    """Explain what to do if this CPU supports kernels but none are present; None if they are present or cannot be used anyway."""
    if find_kernels() is not None or _choice == "none" or not _list_supported():
        return None
    return "the package was installed without its own kernels, which this processor could run: with a C compiler, install it again"


def _list_supported() -> list[InstructionSet]:
    """Return the instruction sets of this CPU, fastest first."""
    flags = read_processor_flags()
    return [one for one in INSTRUCTION_SETS if one.machine == platform.machine() and one.flags <= flags]


_disabled = False
_choice = "auto"


def choose_kernels(choice: str) -> None:
    """Set which kernels this process uses: "auto" (the fastest), "none" (PyTorch's), or the name of an instruction set.

    Raises ConfigError if they are not built, or not supported by this CPU.
    """
    global _choice
    if choice not in ("auto", "none") and _load(choice) is None:
        usable = [one.name for one in INSTRUCTION_SETS if _load(one.name) is not None]
        raise ConfigError(f"--cpu-kernels {choice}: this machine runs only {', '.join([*usable, 'none'])}")
    _choice = choice


def find_kernels() -> Kernels | None:
    """Return the kernels for CPU tensors; None if they are not built, built from other sources, or not supported by this CPU."""
    if _disabled or _choice == "none":
        return None
    names = [one.name for one in INSTRUCTION_SETS] if _choice == "auto" else [_choice]
    return next((kernels for name in names if (kernels := _load(name)) is not None), None)


def list_kernels() -> list[Kernels]:
    """Return all kernels that this machine runs, fastest first."""
    return [kernels for one in INSTRUCTION_SETS if (kernels := _load(one.name)) is not None]


@contextmanager
def kernels_disabled() -> Iterator[None]:
    """Disable native kernels for models built in this context, to compare both paths."""
    global _disabled
    before, _disabled = _disabled, True
    try:
        yield
    finally:
        _disabled = before


@contextmanager
def kernels_chosen(choice: str) -> Iterator[None]:
    """Use these kernels for models built in this context; see choose_kernels."""
    global _choice
    before = _choice
    choose_kernels(choice)
    try:
        yield
    finally:
        _choice = before


@functools.cache
def _load(name: str) -> Kernels | None:
    for suffix in EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(f"_kernels_{name}{suffix}")
        if path.exists():
            try:
                kernels = Kernels(ctypes.CDLL(str(path)), next(one for one in INSTRUCTION_SETS if one.name == name))
            except (OSError, AttributeError) as error:
                warnings.warn(f"{path.name} cannot be used and PyTorch's slower products are: {error}; install again", stacklevel=2)
                return None
            return kernels if kernels.is_usable else None
    return None


def _check(failed: int, out: torch.Tensor) -> torch.Tensor:
    if failed:
        raise MemoryError("a kernel found no memory for its work space")
    return out
