"""The instruction sets that the kernels are built for: one library each, all from the same sources."""

import functools
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class InstructionSet:
    """One library of kernels."""

    name: str
    """Name of the library after `_kernels_`, and the value of --cpu-kernels."""
    machine: str
    """Machine type as in platform.machine()."""
    flags: frozenset[str]
    """CPU flags that it requires, by their Linux names."""
    adds_pairs: bool = False
    """Whether products of bfloat16 are added in pairs, which rounds differently from all other sets."""


_AVX2 = frozenset({"avx2", "fma", "f16c"})
_AVX512 = _AVX2 | {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni"}

INSTRUCTION_SETS: tuple[InstructionSet, ...] = (
    InstructionSet("avx512_amx", "x86_64", _AVX512 | {"avx512_bf16", "amx_tile", "amx_int8"}, adds_pairs=True),
    InstructionSet("avx512_bf16", "x86_64", _AVX512 | {"avx512_bf16"}, adds_pairs=True),
    InstructionSet("avx512_vnni", "x86_64", _AVX512),
    InstructionSet("avx_vnni", "x86_64", _AVX2 | {"avx_vnni"}),
    InstructionSet("avx2", "x86_64", _AVX2),
    InstructionSet("neon_i8mm", "aarch64", frozenset({"asimddp", "i8mm"})),
    InstructionSet("neon_dotprod", "aarch64", frozenset({"asimddp"})),
)
"""The fastest of each machine type first."""


@functools.cache
def read_processor_flags() -> frozenset[str]:
    """Return the flags of this CPU, by their Linux names; none on other systems."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, flags = line.partition(":")
            if name.strip() in ("flags", "Features"):
                return frozenset(flags.split())
    return frozenset()
