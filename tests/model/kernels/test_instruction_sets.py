"""Kernels of every instruction set: the same bits on all of them, those of other machines under an emulator."""

import platform
import shutil
import subprocess
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from itertools import pairwise
from pathlib import Path
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.settings.options import CpuKernels
from model.backends.int8 import PLAIN, Part, sliced_linear
from model.kernels.instruction_set import INSTRUCTION_SETS
from model.kernels.library import Kernels, choose_kernels, find_kernels, kernels_chosen, list_kernels
from parallel.errors import ConfigError

FOLDER = Path(__file__).resolve().parents[3] / "model" / "kernels"
PROGRAM = Path(__file__).with_name("print_results.c")
ARM_FLAGS = {"neon_dotprod": "-march=armv8.2-a+dotprod", "neon_i8mm": "-march=armv8.2-a+dotprod+i8mm"}
ARM_COMPILER, ARM_EMULATOR = "aarch64-linux-gnu-gcc", "qemu-aarch64"
PARTS = pytest.mark.parametrize("kernels", list_kernels(), ids=lambda kernels: kernels.name)


@cache
def print_results(name: str, folder: Path) -> str:
    """Hashes of the results of all kernels of an instruction set that this machine runs."""
    library = next(path for suffix in EXTENSION_SUFFIXES if (path := FOLDER / f"_kernels_{name}{suffix}").exists())
    program = folder / name
    command = ["gcc", "-std=gnu11", "-O1", f"-I{FOLDER}", str(PROGRAM), str(library), "-fopenmp", "-lm", "-o", str(program)]
    subprocess.run([*command, f"-Wl,-rpath,{FOLDER}"], check=True, capture_output=True, timeout=120)
    return subprocess.run([program], check=True, capture_output=True, text=True, timeout=120).stdout


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    if find_kernels() is None or shutil.which("gcc") is None:
        pytest.skip("no kernels of this machine, or no gcc to build a program that prints their results")
    folder = tmp_path_factory.mktemp("results")
    return {kernels.name: print_results(kernels.name, folder) for kernels in list_kernels()}


def leave_out_pairs(name: str, text: str) -> list[str]:
    """The lines that are the same everywhere: AVX-512 BF16 adds products of bfloat16 in pairs."""
    in_pairs = ("float_linear 1 ", "attend_float 1 ")
    adds_pairs = next(one.adds_pairs for one in INSTRUCTION_SETS if one.name == name)
    return [line for line in text.splitlines() if not adds_pairs or not line.startswith(in_pairs)]


def test_every_instruction_set_gives_the_same_bits(results: dict[str, str]) -> None:
    *_, last = results.values()
    assert len(last.splitlines()) > 250 and "differs" not in last
    for name, text in results.items():
        assert leave_out_pairs(name, text) == leave_out_pairs(name, last), name


def compile_for_arm(name: str, program: Path, main: Path) -> None:
    """Compile the kernels of an ARM instruction set and a main program; skips the test where that is not possible."""
    for tool in (ARM_COMPILER, ARM_EMULATOR):
        if shutil.which(tool) is None:
            pytest.skip(f"no {tool} (Debian: gcc-aarch64-linux-gnu, qemu-user)")
    header = ["-E", "-include", "stdio.h", "-x", "c", "/dev/null"]
    if subprocess.run([ARM_COMPILER, *header], capture_output=True, timeout=60).returncode:
        pytest.skip("no C library for ARM (Debian: libc6-dev-arm64-cross)")
    sources = [str(path) for path in sorted(FOLDER.glob("*.c"))]
    flags = ["-std=gnu11", "-O1", "-ffp-contract=off", "-Wno-unknown-pragmas", ARM_FLAGS[name], f"-I{FOLDER}", "-static"]
    subprocess.run([ARM_COMPILER, *flags, *sources, str(main), "-lm", "-o", str(program)], check=True, capture_output=True, timeout=300)


@pytest.mark.parametrize("name", ARM_FLAGS)
def test_arm_gives_the_same_bits(results: dict[str, str], name: str, tmp_path: Path) -> None:
    if platform.machine() == "aarch64":
        pytest.skip("this is an ARM machine: its libraries are compared above")
    program = tmp_path / name
    compile_for_arm(name, program, PROGRAM)
    answer = subprocess.run([ARM_EMULATOR, "-cpu", "max", program], check=True, capture_output=True, text=True, timeout=300)
    name, text = list(results.items())[-1]
    assert leave_out_pairs(name, answer.stdout) == leave_out_pairs(name, text)


def test_arm_orders_the_words_of_shared_memory(tmp_path: Path) -> None:
    """The emulator keeps the order of x86-64 at least, so the instructions are looked at too."""
    program = tmp_path / "exchange"
    compile_for_arm("neon_dotprod", program, PROGRAM.with_name("exchange_rounds.c"))
    answer = subprocess.run([ARM_EMULATOR, "-cpu", "max", program], check=True, capture_output=True, text=True, timeout=120)
    assert answer.stdout.split() == ["0", "0"]
    for function, instruction in (("tandem_load_word", "lda"), ("tandem_store_word", "stlr")):
        command = [ARM_COMPILER.replace("gcc", "objdump"), f"--disassemble={function}", str(program)]
        code = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout
        assert f"\t{instruction}" in code, code


def test_tiles_give_the_same_bits_where_they_are_emulated(results: dict[str, str], tmp_path: Path) -> None:
    if "avx512_bf16" not in results:
        pytest.skip("no AVX-512 BF16, which the rest of the library of AMX consists of")
    program = tmp_path / "tiles"
    flags = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni", "-mavx512bf16", "-mfma", "-DEMULATED_TILES"]
    sources = [*map(str, sorted(FOLDER.glob("*.c"))), str(PROGRAM)]
    command = ["gcc", "-std=gnu11", "-O1", "-ffp-contract=off", "-Wno-unknown-pragmas", *flags, f"-I{FOLDER}", *sources, "-lm", "-o"]
    subprocess.run([*command, str(program)], check=True, capture_output=True, timeout=300)
    answer = subprocess.run([program], check=True, capture_output=True, text=True, timeout=120)
    assert answer.stdout == results["avx512_bf16"]


@settings(max_examples=12, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("kernels", list_kernels(), ids=lambda kernels: kernels.name)
def test_many_tokens_equal_the_plain_product(kernels: Kernels, data: st.DataObject) -> None:
    tokens, rows, columns = data.draw(st.integers(20, 170)), data.draw(st.integers(1, 70)), data.draw(st.integers(1, 200))
    inner = data.draw(st.sets(st.integers(1, columns), max_size=3)) - {columns}
    slices, threads = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 2))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    bounds = [0, *sorted(inner), columns]
    weight = torch.randint(-128, 128, (rows, columns), generator=generator, dtype=torch.int8)
    scale = torch.rand((rows, len(bounds) - 1), generator=generator)
    x = torch.randn((tokens, columns), generator=generator) * 3
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        many = kernels.int8_linear(x, weight, scale, torch.tensor(bounds), slices, torch.float32)
    finally:
        torch.set_num_threads(before)
    alone = [kernels.int8_linear(x[i : i + 1], weight, scale, torch.tensor(bounds), slices, torch.float32) for i in range(tokens)]
    assert torch.equal(many, torch.cat(alone))
    if slices == 3:
        parts = [
            Part(a, b, PLAIN.pack(weight[:, a:b].contiguous(), scale[:, index].contiguous()))
            for index, (a, b) in enumerate(pairwise(bounds))
        ]
        assert torch.equal(many, sliced_linear(x, parts, PLAIN))


@PARTS
@pytest.mark.parametrize("group", [32, 48, 128, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_packed_4_bits_equal_the_plain_product(kernels: Kernels, group: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(group)
    columns, rows = 200, 37
    starts = torch.tensor([*range(0, columns, group), columns])
    zeros = torch.randint(0, 16, (rows, len(starts) - 1), generator=generator)
    integers = torch.randint(0, 16, (rows, columns), generator=generator)
    weight = (integers - zeros.repeat_interleave(starts.diff(), dim=1)).to(torch.int8)
    scale = torch.rand((rows, len(starts) - 1), generator=generator)
    packed = kernels.pack_int4(weight, scale, starts)
    assert packed is not None
    for tokens in (1, 2, 3, 5, 19):
        x = (torch.randn((tokens, columns), generator=generator) * 3).to(dtype)
        parts = [
            Part(a, b, PLAIN.pack(weight[:, a:b].contiguous(), scale[:, index].contiguous()))
            for index, (a, b) in enumerate(zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True))
        ]
        slices = 3 if dtype == torch.float32 else 2
        assert torch.equal(kernels.int4_linear(x, packed, slices, dtype), sliced_linear(x, parts, PLAIN).to(dtype))
        assert torch.equal(kernels.int8_linear(x, weight, scale, starts, slices, dtype), sliced_linear(x, parts, PLAIN).to(dtype))


@PARTS
def test_integers_of_more_than_4_bits_are_not_packed(kernels: Kernels) -> None:
    weight = torch.zeros((16, 32), dtype=torch.int8)
    weight[3, 5], weight[3, 6] = -8, 8
    assert kernels.pack_int4(weight, torch.ones(16, 1), torch.tensor([0, 32])) is None


@PARTS
def test_one_slice_is_the_activation_quantization_of_compressed_tensors(kernels: Kernels) -> None:
    generator = torch.Generator().manual_seed(1)
    x = (torch.randn((7, 300), generator=generator) * 5).to(torch.bfloat16)
    x[2] = 0
    weight, scale = torch.randint(-128, 128, (33, 300), generator=generator, dtype=torch.int8), torch.rand((33, 1), generator=generator)
    row_scale = x.abs().amax(dim=1, keepdim=True).float().div(127.5).clamp_min(1e-30)
    integers = (x.float() / row_scale).round().clamp(-128, 127)
    right = (integers.double() @ weight.double().T).float().mul(scale.T).mul(row_scale).to(x.dtype)
    assert torch.equal(kernels.int8_linear(x, weight, scale, torch.tensor([0, 300]), 1, x.dtype), right)


def test_a_choice_holds_for_models_built_in_it() -> None:
    for kernels in list_kernels():
        with kernels_chosen(kernels.name):
            chosen = find_kernels()
            assert chosen is not None and chosen.name == kernels.name
    with kernels_chosen("none"):
        assert find_kernels() is None


def test_the_command_line_knows_every_set() -> None:
    assert get_args(CpuKernels) == ("auto", *(one.name for one in INSTRUCTION_SETS), "none")


def test_a_set_of_another_machine_is_refused() -> None:
    other = next(one.name for one in INSTRUCTION_SETS if one.machine != platform.machine())
    with pytest.raises(ConfigError, match=f"--cpu-kernels {other}: this machine runs only .*none"):
        choose_kernels(other)
