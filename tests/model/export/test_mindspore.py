"""Writing `.ckpt` files: read back bit for bit, a real file written again byte for byte, failures on the way, and the real MindSpore."""

import json
import os
import subprocess
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from model.checkpoint.completeness import check_checkpoint
from model.checkpoint.folder_writing import write_json
from model.checkpoint.formats import open_checkpoint
from model.checkpoint.mindspore_file import MindSporeFile
from model.checkpoint.mindspore_header import MindSporeHeader, read_mindspore_header
from model.checkpoint.source import CheckpointSource
from model.export import mindspore as mindspore_writing
from model.export.conversion import convert_checkpoint
from model.export.mindspore import write_mindspore
from model.spec.config import build_config
from model.spec.linear_scheme import LinearScheme
from model.spec.packing import unpack_integers
from model.spec.quantization_sections import KV_CACHE_KEY
from model.spec.scheme import Scheme, declare_scheme, read_scheme
from parallel.errors import CheckpointError
from parallel.file_slices import FileReader

SAMPLE_CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "rms_norm_eps": 1e-5,
}
"""Of the real sample."""


def pass_over(done: int, total: int) -> None:
    pass


def write(
    source: CheckpointSource,
    target: Path,
    dtype: str | None = None,
    scheme: Scheme | None = None,
    on_progress: Callable[[int, int], None] = pass_over,
) -> None:
    write_mindspore(source, build_config(source.config), scheme or read_scheme(source.config), target, dtype, on_progress)


def read_header(file: Path) -> MindSporeHeader:
    reader = FileReader()
    try:
        return read_mindspore_header(file, reader)
    finally:
        reader.close()


def read_stored(file: Path) -> dict[str, tuple[tuple[int, ...], str, bytes]]:
    """Dims, type and content by tag."""
    data = file.read_bytes()
    return {
        tag: (one.dims, one.tensor_type, b"".join(data[offset : offset + length] for offset, length in one.slices))
        for tag, one in read_header(file).tensors.items()
    }


def read_tensors(source: CheckpointSource) -> dict[str, torch.Tensor]:
    reader = FileReader()
    try:
        return {name: source.read_rows(reader, name, 0, info.shape[0]) for name, info in source.tensors.items()}
    finally:
        reader.close()


def check_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def check_crc(file: Path) -> None:
    data = file.read_bytes()
    assert data[-17:-10] == b"crc_num" and int.from_bytes(data[-10:], "big") == zlib.crc32(data[:-17])


# ---- round trips


@pytest.mark.parametrize("name", ["nine_heads", "tied", "llama3_rope"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("slice_bytes", [1024, 1000, 512 << 20])
def test_float_weights_come_back_bit_for_bit(
    name: str, dtype: str, slice_bytes: int, tmp_path: Path, tiny_llama: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mindspore_writing, "SLICE_BYTES", slice_bytes)
    write(open_checkpoint(tiny_llama(name)), tmp_path / "x.ckpt", dtype)
    check_crc(tmp_path / "x.ckpt")
    source = MindSporeFile(tmp_path / "x.ckpt")
    before = load_file(tiny_llama(name) / "model.safetensors")
    check_equal(read_tensors(source), {name: tensor.to(getattr(torch, dtype)) for name, tensor in before.items()})
    assert source.config["torch_dtype"] == dtype and "dtype" not in source.config
    assert build_config(source.config).rope_scaling == build_config(open_checkpoint(tiny_llama(name)).config).rope_scaling
    check_checkpoint(source, build_config(source.config), Scheme())
    longest = max(len(stored.slices) for stored in read_header(tmp_path / "x.ckpt").tensors.values())
    assert longest == (
        1
        if slice_bytes > 1 << 20
        else -(-max(tensor.numel() for tensor in before.values()) * (4 if dtype == "float32" else 2) // slice_bytes)
    )
    assert ("lm_head.weight" in read_header(tmp_path / "x.ckpt").tensors) == (name != "tied")


def test_types_are_kept_when_none_is_asked_for(tmp_path: Path, tiny_llama: Callable[[str], Path]) -> None:
    convert_checkpoint(open_checkpoint(tiny_llama("tied")), tmp_path / "half", "bfloat16", pass_over)
    write(open_checkpoint(tmp_path / "half"), tmp_path / "x.ckpt")
    check_equal(read_tensors(MindSporeFile(tmp_path / "x.ckpt")), load_file(tmp_path / "half" / "model.safetensors"))
    assert MindSporeFile(tmp_path / "x.ckpt").config["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize("name", ["nine_heads", "tied"])
@pytest.mark.parametrize("words", [("lm_head",), ("layers.1.mlp", "o_proj")])
def test_rounded_weights_come_back_bit_for_bit(
    name: str,
    words: tuple[str, ...],
    tmp_path: Path,
    tiny_llama: Callable[[str], Path],
    quantize: Callable[..., Scheme],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("model.checkpoint.source.PIECE_BYTES", 1000)
    scheme = quantize(tiny_llama(name), tmp_path / "int8", *words)
    write(open_checkpoint(tmp_path / "int8"), tmp_path / "x.ckpt", "float16")
    source = MindSporeFile(tmp_path / "x.ckpt")
    found = read_scheme(source.config)
    assert (found.linear, set(found.ignore)) == (LinearScheme(packed=False), set(scheme.ignore))
    check_checkpoint(source, build_config(source.config), found)
    before = load_file(tmp_path / "int8" / "model.safetensors")
    expected = {}
    for key, tensor in before.items():
        if key.endswith(".weight_packed"):
            columns = int(before[key.replace("_packed", "_shape")][1])
            expected[key.replace("_packed", "")] = unpack_integers(tensor, 8, columns)
        elif key.endswith(".weight_scale"):
            expected[key] = tensor
        elif not key.endswith(".weight_shape"):
            expected[key] = tensor.half()
    check_equal(read_tensors(source), expected)
    # Once more, from int8 that is not packed.
    write(source, tmp_path / "again" / "x.ckpt")
    assert (tmp_path / "again" / "x.ckpt").read_bytes() == (tmp_path / "x.ckpt").read_bytes()


def test_the_real_rounded_sample_is_written_as_it_is(shared_dir: Path, tmp_path: Path) -> None:
    for name in ("rtn-a16w8_float32", "fp_float32", "fp_float16"):
        file = shared_dir / "data" / "mindspore_ckpt" / "golden_stick" / f"{name}.ckpt"
        write(MindSporeFile(file, SAMPLE_CONFIG), tmp_path / f"{name}.ckpt")
        assert read_stored(tmp_path / f"{name}.ckpt") == read_stored(file)
    # Another form of the same integers gets the same names.
    other = shared_dir / "data" / "mindspore_ckpt" / "golden_stick" / "ptq_a16w8_float32.ckpt"
    write(MindSporeFile(other, SAMPLE_CONFIG), tmp_path / "ptq.ckpt")
    assert read_stored(tmp_path / "ptq.ckpt").keys() == read_stored(tmp_path / "rtn-a16w8_float32.ckpt").keys()


def test_progress_counts_the_bytes(tmp_path: Path, tiny_llama: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.checkpoint.source.PIECE_BYTES", 10_000)
    steps: list[tuple[int, int]] = []
    write(open_checkpoint(tiny_llama("tied")), tmp_path / "x.ckpt", "float16", on_progress=lambda done, total: steps.append((done, total)))
    stored = sum(len(content) for _, _, content in read_stored(tmp_path / "x.ckpt").values())
    assert [total for _, total in steps] == [stored] * len(steps)
    done = [step for step, _ in steps]
    assert done == sorted(done) and done[-1] == stored and len(steps) > len(read_stored(tmp_path / "x.ckpt"))


# ---- files and folders


def test_a_folder_holds_the_file_the_config_and_the_tokenizer(tmp_path: Path, tiny_llama: Callable[[str], Path]) -> None:
    convert_checkpoint(open_checkpoint(tiny_llama("tied")), tmp_path / "source", None, pass_over)
    (tmp_path / "source" / "tokenizer.json").write_text("{}")
    write(open_checkpoint(tmp_path / "source"), tmp_path / "new" / "named")
    names = [file.name for file in (tmp_path / "new" / "named").iterdir() if file.name != "generation_config.json"]
    assert sorted(names) == ["config.json", "named.ckpt", "tokenizer.json"]
    source = open_checkpoint(tmp_path / "new" / "named")
    check_equal(read_tensors(source), load_file(tmp_path / "source" / "model.safetensors"))
    assert source.tokenizer_path() == tmp_path / "new" / "named"
    with pytest.raises(CheckpointError, match="name a folder without 'strategy'"):
        write(source, tmp_path / "my_strategy")
    (tmp_path / "folder.ckpt").mkdir()
    with pytest.raises(CheckpointError, match="is a folder, but a file is to be written there"):
        write(source, tmp_path / "folder.ckpt")


def test_a_config_that_is_there_is_left_alone(tmp_path: Path, tiny_llama: Callable[[str], Path], quantize: Callable[..., Scheme]) -> None:
    quantize(tiny_llama("nine_heads"), tmp_path / "int8", "lm_head")
    before = (tmp_path / "int8" / "config.json").read_bytes()
    assert b"pack-quantized" in before
    write(open_checkpoint(tmp_path / "int8"), tmp_path / "int8" / "x.ckpt")
    assert (tmp_path / "int8" / "config.json").read_bytes() == before
    # What it says of the packed weights beside the file is not true of the file.
    assert read_scheme(MindSporeFile(tmp_path / "int8" / "x.ckpt").config) == Scheme(LinearScheme(packed=False), ("lm_head",))
    write(open_checkpoint(tiny_llama("nine_heads")), tmp_path / "int8" / "y.ckpt")
    assert read_scheme(MindSporeFile(tmp_path / "int8" / "y.ckpt").config) == Scheme()
    write(open_checkpoint(tmp_path / "int8"), tmp_path / "alone" / "x.ckpt")
    assert "quantization_config" not in json.loads((tmp_path / "alone" / "config.json").read_text())


def test_a_failure_on_the_way_leaves_nothing_and_an_earlier_file_as_it_was(tmp_path: Path, tiny_llama: Callable[[str], Path]) -> None:
    def fail(done: int, total: int) -> None:
        if done > total // 2:
            raise OSError("no space left")

    source = open_checkpoint(tiny_llama("tied"))
    for target in (tmp_path / "x.ckpt", tmp_path / "folder"):
        with pytest.raises(OSError, match="no space left"):
            write(source, target, on_progress=fail)
        assert list(tmp_path.iterdir()) == []
    write(source, tmp_path / "x.ckpt")
    before = (tmp_path / "x.ckpt").read_bytes()
    with pytest.raises(OSError, match="no space left"):
        write(source, tmp_path / "x.ckpt", "float16", on_progress=fail)
    assert (tmp_path / "x.ckpt").read_bytes() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "x.ckpt"]
    # MindSpore leaves its files unwritable.
    (tmp_path / "x.ckpt").chmod(0o400)
    write(source, tmp_path / "x.ckpt", "float16")
    assert (tmp_path / "x.ckpt").stat().st_size < len(before)


# ---- what is refused


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        (Scheme(LinearScheme(bits=4, group_size=32)), "a16w4-g32 has no form in a .ckpt file; float weights and rtn-a16w8 have one"),
        (Scheme(LinearScheme(group_size=32)), "a16w8-g32 has no form"),
        (Scheme(LinearScheme(activation="token")), "a8w8-dynamic has no form"),
        (Scheme(LinearScheme(act_order=True)), "has no form"),
        (Scheme(kv_cache="channel"), "an int8 key-value cache with a scale for each channel cannot be written"),
        (Scheme(LinearScheme(), kv_cache="tensor"), "an int8 key-value cache with a scale for each tensor cannot be written"),
    ],
)
def test_other_schemes_are_refused(scheme: Scheme, message: str, tmp_path: Path, tiny_llama: Callable[[str], Path]) -> None:
    with pytest.raises(CheckpointError, match=message):
        write(open_checkpoint(tiny_llama("tied")), tmp_path / "x.ckpt", scheme=scheme)
    assert list(tmp_path.iterdir()) == []


def test_a_cache_with_scales_made_on_the_way_is_declared_in_the_config(tmp_path: Path, tiny_llama: Callable[[str], Path]) -> None:
    convert_checkpoint(open_checkpoint(tiny_llama("tied")), tmp_path / "source", None, pass_over)
    raw = json.loads((tmp_path / "source" / "config.json").read_text())
    write_json(tmp_path / "source" / "config.json", declare_scheme(raw, Scheme(kv_cache="token")))
    write(open_checkpoint(tmp_path / "source"), tmp_path / "target")
    source = open_checkpoint(tmp_path / "target")
    assert read_scheme(source.config) == Scheme(kv_cache="token") and KV_CACHE_KEY in source.config


def test_tensors_that_would_be_left_out_or_are_missing_are_named(tmp_path: Path, tiny_llama: Callable[[str], Path]) -> None:
    source: Any = open_checkpoint(tiny_llama("tied"))
    source.tensors = dict(source.tensors) | {
        "model.layers.0.self_attn.q_proj.bias": source.tensors["model.norm.weight"],
        "model.layers.0.self_attn.rotary_emb.inv_freq": source.tensors["model.norm.weight"],
        "lm_head.weight": source.tensors["model.embed_tokens.weight"],
    }
    with pytest.raises(CheckpointError, match=r"1 unexpected: model\.layers\.0\.self_attn\.q_proj\.bias$"):
        write(source, tmp_path / "x.ckpt")
    del source.tensors["model.layers.0.self_attn.q_proj.bias"]
    write(source, tmp_path / "x.ckpt")
    assert not any(name.startswith(("lm_head", "model.layers.0.self_attn")) for name in read_header(tmp_path / "x.ckpt").tensors)
    del source.tensors["model.norm.weight"]
    with pytest.raises(CheckpointError, match=r"1 missing: model\.norm\.weight"):
        write(source, tmp_path / "y.ckpt")


# ---- the real MindSpore


LOAD = """
import sys, numpy as np, mindspore as ms
for file in sys.argv[1:]:
    found = ms.load_checkpoint(file, crc_check=True)
    # numpy has no bfloat16; float32 holds each of its values.
    arrays = {name: (one.float() if one.dtype == ms.bfloat16 else one).asnumpy() for name, one in found.items()}
    types = {name + "__type": np.array(str(one.dtype)) for name, one in found.items()}
    np.savez(file + ".npz", **arrays, **types)
"""
SAVE = """
import sys, numpy as np, mindspore as ms
from mindspore import Tensor
from mindspore.train import serialization
folder, random = sys.argv[1], np.random.default_rng(1)
arrays = {"a.weight": random.standard_normal((60, 33)).astype(np.float16), "b": np.arange(77, dtype=np.int8).reshape(7, 11),
          "c": random.standard_normal((5,)).astype(np.float32)}
big = {"before": arrays["b"], "big": random.integers(0, 2**31, (70, 1 << 18), dtype=np.int32), "after": arrays["c"]}
np.savez(folder + "/small.npz", **arrays)
np.savez(folder + "/big.npz", **big)
def save(name, arrays, **options):
    ms.save_checkpoint([{"name": key, "data": Tensor(value)} for key, value in arrays.items()], folder + "/" + name + ".ckpt", **options)
save("small-plain", arrays, crc_check=True)
for mode in ("AES-GCM", "AES-CBC", "SM4-CBC"):
    save("small-" + mode, arrays, enc_key=b"0123456789ABCDEF", enc_mode=mode)
    save("small-crc-" + mode, arrays, enc_key=b"0123456789ABCDEF", enc_mode=mode, crc_check=True)
for mode in ("AES-GCM", "AES-CBC"):
    save("big-" + mode, big, enc_key=b"0123456789ABCDEF", enc_mode=mode)
serialization.SLICE_SIZE = 1
save("small-sliced", arrays, crc_check=True)
"""


@pytest.fixture(scope="module")
def run_mindspore() -> Callable[..., None]:
    """A function that runs a script with the interpreter that TANDEM_MINDSPORE_PYTHON names, which has MindSpore installed."""
    python = os.environ.get("TANDEM_MINDSPORE_PYTHON")
    if not python:
        pytest.skip("TANDEM_MINDSPORE_PYTHON names no interpreter with mindspore installed")

    def run(script: str, *arguments: Path) -> None:
        done = subprocess.run([python, "-c", script, *map(str, arguments)], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]

    return run


def test_the_real_mindspore_loads_what_is_written_here(
    tmp_path: Path,
    tiny_llama: Callable[[str], Path],
    quantize: Callable[..., Scheme],
    run_mindspore: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    quantize(tiny_llama("nine_heads"), tmp_path / "int8", "lm_head")
    for dtype in ("float32", "float16", "bfloat16"):
        write(open_checkpoint(tiny_llama("nine_heads")), tmp_path / f"{dtype}.ckpt", dtype)
    write(open_checkpoint(tmp_path / "int8"), tmp_path / "rtn.ckpt")
    monkeypatch.setattr(mindspore_writing, "SLICE_BYTES", 1024)
    write(open_checkpoint(tiny_llama("nine_heads")), tmp_path / "sliced.ckpt", "bfloat16")
    files = sorted(tmp_path.glob("*.ckpt"))
    run_mindspore(LOAD, *files)
    assert len(files) == 5
    for file in files:
        stored = read_header(file).tensors
        content = read_stored(file)
        with np.load(f"{file}.npz") as found:
            assert [name for name in found if not name.endswith("__type")] == list(stored)
            for name, one in stored.items():
                assert str(found[f"{name}__type"]) == one.tensor_type and found[name].shape == one.dims
                values = found[name]
                if one.tensor_type == "BFloat16":
                    values = (np.ascontiguousarray(values).view(np.uint32) >> 16).astype(np.uint16)
                assert values.tobytes() == content[name][2], (file, name)


def test_what_the_real_mindspore_saves_is_read(tmp_path: Path, run_mindspore: Callable[..., None]) -> None:
    run_mindspore(SAVE, tmp_path)
    (tmp_path / "key").write_bytes(b"0123456789ABCDEF")
    files = sorted(tmp_path.glob("*.ckpt"))
    assert len(files) == 10
    for file in files:
        source = MindSporeFile(file, {}, tmp_path / "key")
        found = read_tensors(source)
        with np.load(tmp_path / f"{file.name.partition('-')[0]}.npz") as expected:
            assert list(found) == list(expected)
            for name in expected:
                assert np.array_equal(found[name].numpy(), expected[name]), (file, name)
        assert len(source.checksums) == (file.stem in ("small-plain", "small-sliced"))
    assert len(read_header(tmp_path / "small-sliced.ckpt").tensors["a.weight"].slices) == 4
