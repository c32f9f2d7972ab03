"""The instruction sets that the kernels are built for: one library each, all from the same sources."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class InstructionSet:
    """One library of kernels."""

    name: str
    """Name of the library after `_kernels_`, and the value of --cpu-kernels."""
    machine: str
    """Machine type as in platform.machine()."""
    flags: frozenset[str]
    """CPU flags that it requires, by their Linux names."""


_AVX2 = frozenset({"avx2", "fma", "f16c"})
_AVX512 = _AVX2 | {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni"}

INSTRUCTION_SETS: tuple[InstructionSet, ...] = (
    InstructionSet("avx512_bf16", "x86_64", _AVX512 | {"avx512_bf16"}),
    InstructionSet("avx512_vnni", "x86_64", _AVX512),
    InstructionSet("avx_vnni", "x86_64", _AVX2 | {"avx_vnni"}),
    InstructionSet("avx2", "x86_64", _AVX2),
    InstructionSet("neon_i8mm", "aarch64", frozenset({"asimddp", "i8mm"})),
    InstructionSet("neon_dotprod", "aarch64", frozenset({"asimddp"})),
)
"""The fastest of each machine type first."""
