"""Checkpoints rewritten for 8, 3, 5 and 1 ranks and back: every bit as it was, few bytes read, little memory held."""

import json
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.checkpoint.cache_scales import CACHE_SCALES_FILE
from model.checkpoint.formats import find_format, open_checkpoint
from model.checkpoint.source import CheckpointSource
from model.export.conversion import convert_checkpoint
from model.export.rank_files import write_rank_files
from model.spec.config import LlamaConfig, build_config
from model.spec.linear_scheme import LinearScheme
from model.spec.packing import pack_integers, unpack_integers
from model.spec.scheme import Scheme, declare_scheme, read_scheme
from model.spec.weights import WeightSpec, find_not_converted, linear_names, linear_shape, plan_weights
from parallel.file_slices import FileReader
from parallel.layout import Whole

PROJECT_ROOT = Path(__file__).resolve().parent.parent.parent.parent
STEPS = (8, 3, 5, 1)

# The heads of a 70B model. Units of 5 rows, so that ranks share words of zero points; 344 columns are no whole number of groups.
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 512,
    "intermediate_size": 344,
    "num_hidden_layers": 2,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 8,
    "vocab_size": 256,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
}
INT4 = LinearScheme(bits=4, group_size=64)
STATIC = LinearScheme(packed=False, activation="tensor", activation_symmetric=False)
SCHEMES: dict[str, tuple[LinearScheme | None, tuple[str, ...], str | None]] = {
    # linears, words of those that stay float, cache
    "float16": (None, (), None),
    "int8": (LinearScheme(), (), None),
    "int4": (INT4, ("lm_head",), None),
    "int4 with zero points": (replace(INT4, symmetric=False), ("lm_head",), None),
    "smooth": (replace(STATIC, smooth=True), ("lm_head", "w2"), None),
    "int8 cache": (LinearScheme(), ("lm_head",), "channel"),
}
GPTQ = {"GPTQ in order": (False, True), "GPTQ act-order": (True, True), "GPTQ act-order with zero points": (True, False)}
"""Whether groups are shuffled, and whether there are no zero points."""


def make_tensor(config: LlamaConfig, name: str, spec: WeightSpec) -> torch.Tensor:
    owner, _, part = name.rpartition(".")
    if part == "weight_shape":
        return torch.tensor((config.vocab_size, config.hidden_size) if owner == "lm_head" else linear_shape(config, owner.split(".", 3)[3]))
    kind: torch.dtype = getattr(torch, spec.dtypes[0] if len(spec.dtypes) == 1 else config.dtype)
    if kind.is_floating_point:
        return torch.randn(spec.shape).to(kind)
    return torch.randint(torch.iinfo(kind).min, torch.iinfo(kind).max, spec.shape, dtype=kind)


def write_model(folder: Path, key: str) -> Path:
    """A Hugging Face folder of random bits."""
    linear, words, cache = SCHEMES[key]
    config = build_config(LLAMA)
    scheme = Scheme(linear, find_not_converted(config, words) if linear else (), cache)
    torch.manual_seed(2)
    tensors = {name: make_tensor(config, name, spec) for name, spec in plan_weights(config, scheme).items()}
    return write_folder(folder, tensors, declare_scheme(LLAMA, scheme))


def write_gptq(folder: Path, key: str) -> Path:
    """A folder as AutoGPTQ writes one."""
    act_order, symmetric = GPTQ[key]
    config, group = build_config(LLAMA), 64
    torch.manual_seed(4)
    tensors = {name: make_tensor(config, name, spec) for name, spec in plan_weights(config, Scheme()).items()}
    for name in linear_names(config):
        rows, columns = tensors.pop(f"{name}.weight").shape
        groups, index = -(-columns // group), torch.arange(columns, dtype=torch.int32) // group
        zeros = torch.full((groups, rows), -1) if symmetric else torch.randint(-8, 8, (groups, rows))
        tensors[f"{name}.qweight"] = pack_integers(torch.randint(-8, 8, (rows, columns)), 4).T.contiguous()
        tensors[f"{name}.qzeros"] = pack_integers(zeros, 4)
        tensors[f"{name}.scales"] = (torch.rand(groups, rows) + 0.1).half()
        tensors[f"{name}.g_idx"] = index[torch.randperm(columns)] if act_order else index
    settings = {"quant_method": "gptq", "bits": 4, "group_size": group, "desc_act": act_order, "sym": symmetric}
    return write_folder(folder, tensors, {**LLAMA, "quantization_config": settings})


def write_folder(folder: Path, tensors: dict[str, torch.Tensor], values: dict[str, Any]) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(values))
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function that writes a checkpoint by its key in SCHEMES or GPTQ."""
    made: dict[str, Path] = {}

    def build(key: str) -> Path:
        if key not in made:
            folder = tmp_path_factory.mktemp("model") / "model"
            with torch.random.fork_rng(devices=[]):
                made[key] = write_gptq(folder, key) if key in GPTQ else write_model(folder, key)
        return made[key]

    return build


def reshard(source: Path, world_size: int, target: Path) -> int:
    opened = open_checkpoint(source)
    return write_rank_files(opened, build_config(opened.config), read_scheme(opened.config), world_size, target)


@pytest.fixture(scope="module")
def chain(checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[int, Path]]:
    """A function that writes one checkpoint for 8, 3, 5 and 1 ranks, each from the one before; and gives the folders."""
    made: dict[str, dict[int, Path]] = {}

    def build(key: str) -> dict[int, Path]:
        if key not in made:
            folder, last, steps = tmp_path_factory.mktemp("chain"), checkpoint(key), {}
            for world_size in STEPS:
                steps[world_size] = folder / str(world_size)
                reshard(last, world_size, steps[world_size])
                last = steps[world_size]
            made[key] = steps
        return made[key]

    return build


def read_files(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor that stands in a folder of one file, with the cache scales in a file of their own."""
    scales = folder / CACHE_SCALES_FILE
    return load_file(folder / "model.safetensors") | (load_file(scales) if scales.exists() else {})


def read_all(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor under its canonical name."""
    source, reader = open_checkpoint(folder), FileReader()
    tensors = {name: source.read_rows(reader, name, 0, info.shape[0]) for name, info in source.tensors.items()}
    reader.close()
    return tensors


def check_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """The same names, types, shapes and bits, whatever numbers they are."""
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        bits = [one.contiguous().reshape(-1).view(torch.uint8) for one in (found[name], tensor)]
        assert torch.equal(*bits), name


@pytest.mark.parametrize("key", SCHEMES)
def test_a_folder_written_for_8_3_5_and_1_ranks_is_the_same_folder_again(
    key: str, checkpoint: Callable[[str], Path], chain: Callable[[str], dict[int, Path]], tmp_path: Path
) -> None:
    before = read_files(checkpoint(key))
    convert_checkpoint(open_checkpoint(chain(key)[1]), tmp_path / "hf", None, lambda done, total: None)
    assert find_format(tmp_path / "hf") in ("hf", "compressed-tensors")
    check_same(read_files(tmp_path / "hf"), before)
    config = json.loads((checkpoint(key) / "config.json").read_text())
    assert json.loads((tmp_path / "hf" / "config.json").read_text()) == config
    for world_size, folder in chain(key).items():
        assert json.loads((folder / "config.json").read_text()) == config, world_size
        check_same(read_all(folder), before)


@pytest.mark.parametrize("key", GPTQ)
def test_a_gptq_folder_keeps_every_integer_scale_and_group(
    key: str, checkpoint: Callable[[str], Path], chain: Callable[[str], dict[int, Path]], tmp_path: Path
) -> None:
    before = read_all(checkpoint(key))
    convert_checkpoint(open_checkpoint(chain(key)[1]), tmp_path / "hf", None, lambda done, total: None)
    found = load_file(tmp_path / "hf" / "model.safetensors")
    check_same(found, before)
    for folder in chain(key).values():
        check_same(read_all(folder), before)
    assert json.loads((tmp_path / "hf" / "config.json").read_text()) == open_checkpoint(checkpoint(key)).config
    stored = load_file(checkpoint(key) / "model.safetensors")
    act_order, symmetric = GPTQ[key]
    for name in linear_names(build_config(LLAMA)):
        assert torch.equal(found[f"{name}.weight_packed"], stored[f"{name}.qweight"].T)
        assert torch.equal(found[f"{name}.weight_scale"], stored[f"{name}.scales"].T)
        assert (f"{name}.weight_g_idx" in found) == act_order
        if act_order:
            assert torch.equal(found[f"{name}.weight_g_idx"], stored[f"{name}.g_idx"])
        assert (f"{name}.weight_zero_point" in found) != symmetric
        if not symmetric:
            rows = found[f"{name}.weight_packed"].shape[0]
            zeros = unpack_integers(found[f"{name}.weight_zero_point"].T, 4, rows)
            # Stored minus 1, modulo 16.
            assert torch.equal(zeros, (unpack_integers(stored[f"{name}.qzeros"], 4, rows) + 9) % 16 - 8)


@pytest.mark.parametrize("steps", [(1,), (2, 7), (8, 3, 5, 1)])
def test_the_trained_model_comes_back_bit_for_bit(shared_dir: Path, tmp_path: Path, steps: tuple[int, ...]) -> None:
    last = original = shared_dir / "data" / "stories260K-hf"
    if not original.is_dir():
        pytest.skip("no data/stories260K-hf among the shared data")
    for world_size in steps:
        reshard(last, world_size, tmp_path / str(world_size))
        last = tmp_path / str(world_size)
    convert_checkpoint(open_checkpoint(last), tmp_path / "hf", None, lambda done, total: None)
    stored = load_file(original / "model.safetensors")
    opened = open_checkpoint(original)
    needed = plan_weights(build_config(opened.config), read_scheme(opened.config))
    check_same(load_file(tmp_path / "hf" / "model.safetensors"), {name: stored[name] for name in needed})
    for name in ("tokenizer.model", "tokenizer.json"):
        assert (tmp_path / "hf" / name).read_bytes() == (original / name).read_bytes()


def read_as_rank(source: CheckpointSource, specs: dict[str, WeightSpec], rank: int, world_size: int) -> tuple[int, int]:
    """Bytes that one rank reads for all its rows, and bytes of these rows."""
    reader, own = FileReader(), 0
    for name, spec in specs.items():
        own += source.read_rows(reader, name, *spec.rows(rank, world_size)).nbytes
    reader.close()
    return reader.read_bytes, own


@pytest.mark.parametrize("key", ["float16", "int8", "int4 with zero points", "int8 cache"])
def test_any_number_of_ranks_reads_little_more_than_its_own_rows_of_any_number_of_rank_files(
    key: str, chain: Callable[[str], dict[int, Path]]
) -> None:
    for folder in chain(key).values():
        source = open_checkpoint(folder)
        specs = plan_weights(build_config(source.config), read_scheme(source.config))
        for world_size in (1, 2, 3, 5, 8, 13, 64):
            for rank in range(world_size):
                read_bytes, own = read_as_rank(source, specs, rank, world_size)
                assert own <= read_bytes <= 1.05 * own, (folder.name, rank, world_size)


@pytest.mark.parametrize("key", ["float16", "int8", "smooth", "int8 cache"])
@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 8])
def test_all_ranks_together_read_every_split_tensor_of_an_unsharded_file_once(
    key: str, world_size: int, checkpoint: Callable[[str], Path]
) -> None:
    source = open_checkpoint(checkpoint(key))
    specs = plan_weights(build_config(source.config), read_scheme(source.config))
    read_bytes = sum(read_as_rank(source, specs, rank, world_size)[0] for rank in range(world_size))
    whole = sum(source.tensors[name].num_bytes for name, spec in specs.items() if isinstance(spec.split, Whole))
    split = sum(source.tensors[name].num_bytes for name, spec in specs.items() if not isinstance(spec.split, Whole))
    assert whole > 0 and split > 10 * whole
    assert read_bytes == split + world_size * whole


WRITE_AND_MEASURE = """
import sys
from pathlib import Path
from model.checkpoint.formats import open_checkpoint
from model.export.rank_files import write_rank_files
from model.spec.config import build_config
from model.spec.scheme import Scheme

def peak_bytes():
    # Of this program alone: what getrusage gives starts with the size of the process that started it.
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")) * 1024

small, large, target = map(Path, sys.argv[1:])
def write(folder, target):
    source = open_checkpoint(folder)
    write_rank_files(source, build_config(source.config), Scheme(), 3, target)

write(small, target / "small")
before = peak_bytes()
write(large, target / "large")
print(peak_bytes() - before)
"""


def write_hollow(folder: Path, vocab_size: int) -> Path:
    """A float16 checkpoint of zeros that takes no room on the disk."""
    values = {**LLAMA, "hidden_size": 1024, "num_hidden_layers": 1, "head_dim": 16, "vocab_size": vocab_size, "tie_word_embeddings": True}
    header, end = {}, 0
    for name, spec in plan_weights(build_config(values), Scheme()).items():
        size = 2
        for length in spec.shape:
            size *= length
        header[name] = {"dtype": "F16", "shape": list(spec.shape), "data_offsets": [end, end + size]}
        end += size
    folder.mkdir()
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    (folder / "config.json").write_text(json.dumps(values))
    return folder


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is measured through /proc")
def test_writing_rank_files_holds_less_than_twice_the_largest_tensor(tmp_path: Path) -> None:
    rows = 100_000
    folders = write_hollow(tmp_path / "few", 1000), write_hollow(tmp_path / "many", rows)
    command = [sys.executable, "-c", WRITE_AND_MEASURE, *map(str, folders), str(tmp_path / "out")]
    result = subprocess.run(command, cwd=PROJECT_ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    largest = rows * 1024 * 2
    assert largest > 200_000_000
    assert int(result.stdout) < 2 * largest
    # What grows with a tensor is bounded, too: some pieces of 64 MiB.
    assert int(result.stdout) < 3.5 * (64 << 20)
