"""MindSpore checkpoints: real ones against what MindSpore itself read from them, and small ones written here, byte by byte."""

import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from model.checkpoint.mindspore_file import MindSporeFile
from model.checkpoint.mindspore_header import ELEMENT_TYPES, StoredTensor, read_mindspore_header
from model.checkpoint.source import Checksum
from model.decoder.llama import LlamaForCausalLM
from model.layers.batch import Span
from model.spec.config import build_config
from model.spec.linear_scheme import LinearScheme
from model.spec.scheme import Scheme, read_scheme
from model.spec.weights import compare_tensors, plan_weights
from parallel.errors import CheckpointError, ConfigError
from parallel.file_slices import FileReader
from tests.model.mindspore_files import (
    A8W8,
    CONFIG,
    FUSED,
    HF_NAMES,
    LINEARS,
    add_cache,
    check_complete,
    check_same,
    cut,
    entry,
    field,
    fuse,
    interleave,
    make_a8w8,
    make_float,
    make_plain,
    make_rtn,
    read_all,
    varint,
    write_ckpt,
    write_ranks,
)


def read_tags(file: Path) -> dict[str, StoredTensor]:
    reader = FileReader()
    try:
        return dict(read_mindspore_header(file, reader).tensors)
    finally:
        reader.close()


def linear_pairs() -> list[tuple[str, str]]:
    return [(f"model.layers.{n}.{ours}", f"model.layers.{n}.{theirs}") for n in range(2) for ours, theirs in HF_NAMES.items()]


# ---- real files


SAMPLES = ("append_dict", "bfloat16", "empty_tensor", "float16", "float32", "int8", "ints", "mixed_llama_names", "scalar")


@pytest.mark.parametrize("name", [*SAMPLES, "sliced_1KiB_chunks", "golden_stick/fp_float16", "golden_stick/rtn-a16w8_float32"])
def test_header_of_real_files(shared_dir: Path, name: str) -> None:
    file = shared_dir / "data" / "mindspore_ckpt" / f"{name}.ckpt"
    stored = read_tags(file)
    data = file.read_bytes()
    with np.load(file.with_suffix(".npz")) as truth:
        bits = {key.removesuffix("__bf16_bits") for key in truth if key.endswith("__bf16_bits")}
        # MindSpore does not write tensors without elements.
        assert list(stored) == [key for key in truth if not key.endswith("__bf16_bits") and truth[key].size]
        for tag, tensor in stored.items():
            expected = truth[f"{tag}__bf16_bits"] if tag in bits else truth[tag]
            assert tensor.dims == expected.shape
            content = b"".join(data[offset : offset + length] for offset, length in tensor.slices)
            if tensor.tensor_type == "str":
                assert content.decode("utf-32-le") == str(expected)
            else:
                assert content == expected.tobytes()
                assert ELEMENT_TYPES[tensor.tensor_type].itemsize == expected.itemsize


@pytest.mark.parametrize("name", ["bfloat16", "float32", "sliced_1KiB_chunks"])
def test_rows_of_real_files(shared_dir: Path, name: str) -> None:
    file = shared_dir / "data" / "mindspore_ckpt" / f"{name}.ckpt"
    source = MindSporeFile(file, {})
    with np.load(file.with_suffix(".npz")) as truth:
        for tag in source.tensors:
            rows = read_all(source, tag)
            expected = torch.from_numpy(truth[tag])
            assert torch.equal(rows if rows.dtype == torch.int8 else rows.float(), expected)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_real_float_checkpoint(shared_dir: Path, dtype: str) -> None:
    file = shared_dir / "data" / "mindspore_ckpt" / "golden_stick" / f"fp_{dtype}.ckpt"
    source = MindSporeFile(file, CONFIG)
    check_complete(source)
    assert source.config == CONFIG | {"torch_dtype": dtype}
    with np.load(file.with_suffix(".npz")) as truth:
        for ours, theirs in linear_pairs():
            assert torch.equal(read_all(source, f"{theirs}.weight"), torch.from_numpy(truth[f"{ours}.weight"]))
        for ours, theirs in {
            "tok_embeddings.embedding_weight": "embed_tokens.weight",
            "norm_out.weight": "norm.weight",
            "layers.1.attention_norm.weight": "layers.1.input_layernorm.weight",
            "layers.0.ffn_norm.weight": "layers.0.post_attention_layernorm.weight",
        }.items():
            assert torch.equal(read_all(source, f"model.{theirs}"), torch.from_numpy(truth[f"model.{ours}"]))
        assert torch.equal(read_all(source, "lm_head.weight"), torch.from_numpy(truth["lm_head.weight"]))


def test_real_float_checkpoint_gives_mindformers_logits(shared_dir: Path) -> None:
    folder = shared_dir / "data" / "mindspore_ckpt" / "golden_stick"
    source = MindSporeFile(folder / "fp_float32.ckpt", CONFIG)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{k: v for k, v in CONFIG.items() if k != "model_type"}))
    model.load_state_dict({name: read_all(source, name) for name in source.tensors})
    with torch.no_grad():
        logits = model(torch.tensor([[1, *range(5, 20)]])).logits
    expected = torch.from_numpy(np.load(folder / "fp_logits_float32.npy"))
    torch.testing.assert_close(logits.view(-1), expected.reshape(-1), rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("name", "weight", "scale"),
    [("rtn-a16w8", "_handler.weight", "_weight_quantizer.scale"), ("ptq_a16w8", "_layer.weight", "_layer.matmul.t_scale")],
)
def test_real_int8_checkpoint(shared_dir: Path, name: str, weight: str, scale: str) -> None:
    file = shared_dir / "data" / "mindspore_ckpt" / "golden_stick" / f"{name}_float32.ckpt"
    source = MindSporeFile(file, CONFIG)
    check_complete(source)
    assert read_scheme(source.config) == Scheme(LinearScheme(packed=False), ignore=("lm_head",))
    with np.load(file.with_suffix(".npz")) as truth, np.load(file.with_name("fp_float32.npz")) as plain:
        for ours, theirs in linear_pairs():
            integers, scales = read_all(source, f"{theirs}.weight"), read_all(source, f"{theirs}.weight_scale")
            assert torch.equal(integers, torch.from_numpy(truth[f"{ours}.{weight}"]))
            assert torch.equal(scales, torch.from_numpy(truth[f"{ours}.{scale}"])[:, None])
            difference = integers.float() * scales.float() - torch.from_numpy(plain[f"{ours}.weight"])
            # Half a step of rounding; a float16 scale is off by up to 2^-11 of 128 steps.
            assert (difference.abs() <= scales.float() * 0.57).all()


# ---- the format


def test_slices_crc_types_and_early_spellings(tmp_path: Path) -> None:
    values = torch.randn(9, 7)
    tensors = {"a": values, "b": values.bfloat16(), "c": torch.arange(6, dtype=torch.int16)}
    file = write_ckpt(tmp_path / "x.ckpt", tensors, crc=True, slice_bytes=30)
    source = MindSporeFile(file, {})
    assert len(read_tags(file)["a"].slices) == -(-9 * 7 * 4 // 30)
    assert all(torch.equal(read_all(source, name), tensor) for name, tensor in tensors.items())
    old = entry("u", [3], "Uint16", b"\1\0\2\0\3\0", packed=True) + entry("i", [2, 2], "Int4", b"\x07\xf8\1\2")
    (tmp_path / "old.ckpt").write_bytes(old + entry("s", [], "Float32", b"\0\0\x80?") + entry("note", [0], "str", b"h\0\0\0"))
    stored = read_tags(tmp_path / "old.ckpt")
    assert [stored[name].dims for name in ("u", "i", "s", "note")] == [(3,), (2, 2), (), ()]
    source = MindSporeFile(tmp_path / "old.ckpt", {})
    assert list(source.tensors) == ["u", "i"]
    assert read_all(source, "u").tolist() == [1, 2, 3] and read_all(source, "i").tolist() == [[7, -8], [1, 2]]


def test_only_the_rows_asked_for_are_read(tmp_path: Path) -> None:
    file = write_ckpt(tmp_path / "x.ckpt", make_float(torch.float16), slice_bytes=100)
    source, reader = MindSporeFile(file, CONFIG), FileReader()
    source.read_rows(reader, "model.layers.1.mlp.gate_proj.weight", 3, 10)
    assert reader.read_bytes == 7 * 64 * 2
    assert source.read_rows(reader, "lm_head.weight", 5, 5).shape == (0, 64)
    reader.close()


def test_a_crc_is_told_and_not_checked(tmp_path: Path) -> None:
    file = write_ckpt(tmp_path / "x.ckpt", {"a": torch.arange(40.0)}, crc=True)
    data = bytearray(file.read_bytes())
    expected = zlib.crc32(data[:-17])
    source = MindSporeFile(file, {})
    assert list(source.files) == [file]
    assert source.checksums == {file: Checksum("crc32", f"{expected:08x}", "the file's own CRC", len(data) - 17)}
    data[-40] ^= 1
    file.write_bytes(data)
    assert MindSporeFile(file, {}).checksums == source.checksums
    assert MindSporeFile(write_ckpt(tmp_path / "y.ckpt", {"a": torch.arange(40.0)}), {}).checksums == {}


def test_every_cut_is_noticed_inside_a_value(tmp_path: Path) -> None:
    whole = entry("first", [3], "Float32", bytes(12)) + entry("second", [2, 2], "Float32", bytes(16))
    boundary = len(entry("first", [3], "Float32", bytes(12)))
    file = tmp_path / "x.ckpt"
    for size in range(1, len(whole)):
        file.write_bytes(whole[:size])
        if size == boundary:
            assert list(read_tags(file)) == ["first"]
        else:
            with pytest.raises(CheckpointError, match=rf"has {size} bytes, but what it holds reaches byte \d+"):
                read_tags(file)


def test_missing_slice(tmp_path: Path) -> None:
    (tmp_path / "x.ckpt").write_bytes(entry("a", [4], "Float32", bytes(8)))
    with pytest.raises(CheckpointError, match=r"holds 8 bytes of a, but Float32 \[4\] has 16"):
        read_tags(tmp_path / "x.ckpt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"is empty \(0 bytes\)"),
        (b"PK\x03\x04 a zip file", "is no MindSpore checkpoint"),
        (b"\x08\x01\x08\x01", "is no MindSpore checkpoint"),
        (entry("a", [1], "Float8", b"\0"), "a has type 'Float8'"),
        (entry("a", [1], "Int8", b"\0") + entry("b", [1], "Int8", b"\0") + entry("a", [1], "Int8", b"\0"), "holds a twice"),
        (field(1, field(1, b"a") + field(3, b"")), "holds the map tensor a"),
        (field(1, field(1, b"\xff") + field(2, b"")), "is no MindSpore checkpoint"),
        (field(1, field(1, b"a")), "is no MindSpore checkpoint"),
        (field(1, field(1, b"a") + b"\x12\x7fzz") + entry("b", [1], "Int8", b"\0"), "is no MindSpore checkpoint"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x.ckpt").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_tags(tmp_path / "x.ckpt")


def negative(value: int) -> bytes:
    return varint(value + (1 << 64))


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (b"\x08" + negative(-1) + field(2, b"Int8") + field(3, b""), r"the shape \[-1\], which no tensor has"),
        (b"\x08" + negative(-2) + b"\x08" + negative(-2) + field(2, b"Int8") + field(3, b"abcd"), r"the shape \[-2, -2\]"),
        (b"\x08" + varint(1 << 62) + b"\x08\4" + field(2, b"Float32") + field(3, b"abcd"), "which no tensor has"),
        (b"\x08\0" + b"\x08" + varint(1 << 62) + field(2, b"Float32") + field(3, b""), "which no tensor has"),
        (b"\x08" + varint(1 << 40) + field(2, b"Int8") + field(3, b"abcd"), "holds 4 bytes of a, but Int8 .* has 1099511627776"),
        (b"\x08\1" * 65 + field(2, b"Int8") + field(3, b"a"), "is no MindSpore checkpoint"),
        (field(1, b"\1" * 100_000) + field(2, b"Int8") + field(3, b"a"), "is no MindSpore checkpoint"),
        (b"\x08" + b"\xff" * 9 + b"\x7f" + field(2, b"Int8") + field(3, b"a"), "is no MindSpore checkpoint"),
        (b"\x08" + b"\x80" * 11, "is no MindSpore checkpoint"),
        (b"\x08", "is no MindSpore checkpoint"),
        (b"\x00\x01", "is no MindSpore checkpoint"),
        (field(2, b"I" * 5000) + field(3, b"a"), "is no MindSpore checkpoint"),
        (b"\x1a" + varint(1 << 60), "is no MindSpore checkpoint"),
        (b"\x1a" + varint((1 << 64) - 1), "is no MindSpore checkpoint"),
        (b"", "a has type ''"),
    ],
)
def test_absurd_values(tmp_path: Path, tensor: bytes, message: str) -> None:
    good = entry("z", [1], "Int8", b"\0")
    (tmp_path / "x.ckpt").write_bytes(field(1, field(1, b"a") + field(2, tensor)) + good)
    with pytest.raises(CheckpointError, match=message):
        read_tags(tmp_path / "x.ckpt")


@pytest.mark.parametrize("length", [b"\x80", b"\xff" * 9 + b"\1", varint(1 << 62)])
def test_absurd_lengths_of_a_message(tmp_path: Path, length: bytes) -> None:
    (tmp_path / "x.ckpt").write_bytes(b"\x0a" + length)
    with pytest.raises(CheckpointError):
        read_tags(tmp_path / "x.ckpt")


@pytest.mark.parametrize("kind", ["float", "rtn", "smooth_quant", "fused"])
def test_flipped_bytes_are_an_error_or_other_values(tmp_path: Path, kind: str) -> None:
    tensors = {"float": make_float, "rtn": lambda: add_cache(make_rtn()), "fused": lambda: fuse(make_rtn())}.get(
        kind, lambda: make_a8w8(ptq=False)
    )()
    file = write_ckpt(tmp_path / "x.ckpt", {name: tensor for name, tensor in tensors.items() if "layers.1" not in name})
    whole, generator = file.read_bytes(), np.random.default_rng(3)
    # Contents take most of the file; what describes them is what can go wrong.
    contents = [range(first, first + length) for one in read_tags(file).values() for first, length in one.slices]
    covered = {at for one in contents for at in one}
    described = [at for at in range(len(whole)) if at not in covered]
    refused = 0
    for at in generator.choice(described, 150, replace=False):
        data = bytearray(whole)
        data[at] ^= 1 << int(generator.integers(8))
        file.write_bytes(data)
        try:
            source = MindSporeFile(file, CONFIG, fused_order="1.3")
            for name in source.tensors:
                read_all(source, name)
        except CheckpointError:
            refused += 1
    assert refused > 30


# ---- names


def test_leftovers_are_dropped_and_unknown_names_stay(tmp_path: Path) -> None:
    tensors = make_float() | {
        "global_step": torch.ones(1, dtype=torch.int32),
        "epoch_num": torch.tensor(3),
        "learning_rate": torch.rand(10),
        "adam_m.model.layers.0.attention.wq.weight": torch.rand(64, 64),
        "model.layers.0.attention.wq.bias": torch.rand(64),
        "something.else": torch.rand(2, 2),
    }
    source = MindSporeFile(write_ckpt(tmp_path / "x.ckpt", tensors), CONFIG)
    config = build_config(source.config)
    report = compare_tensors(plan_weights(config, Scheme()), source.tensors, tied=False)
    assert report.describe() == "2 unexpected: something.else, model.layers.0.self_attn.q_proj.bias"
    assert "quantization_config" not in source.config


def test_config_of_caller_of_folder_or_none(tmp_path: Path) -> None:
    file = write_ckpt(tmp_path / "x.ckpt", make_float(torch.bfloat16))
    with pytest.raises(ConfigError, match=r"has no config\.json: give the MindFormers YAML with -c"):
        MindSporeFile(file)
    given = CONFIG | {"torch_dtype": "float16"}
    assert MindSporeFile(file, given).config == given
    assert "torch_dtype" not in CONFIG
    (tmp_path / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    source = MindSporeFile(tmp_path)
    assert source.config == CONFIG | {"torch_dtype": "bfloat16"}
    assert source.tokenizer_path() is None
    (tmp_path / "tokenizer.model").touch()
    assert source.tokenizer_path() == MindSporeFile(file).tokenizer_path() == tmp_path


@pytest.mark.parametrize("ptq", [False, True])
def test_int8_activations(tmp_path: Path, ptq: bool) -> None:
    tensors = make_a8w8(ptq=ptq)
    source = MindSporeFile(write_ckpt(tmp_path / "x.ckpt", tensors), CONFIG)
    check_complete(source)
    floats = () if ptq else ("model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj")
    assert read_scheme(source.config) == Scheme(A8W8, ignore=(*floats, "lm_head"))
    names = ("input_scale", "_layer.bias", "_layer.weight") if ptq else ("_input_quantizer.t_scale", "_handler.bias", "_handler.weight")
    for ours, theirs in linear_pairs():
        if theirs in floats:
            continue
        smooth, bias, weight = (tensors[f"{ours}.{name}"] for name in names)
        encoded = tensors[f"{ours}.{'_layer.matmul.dequant_scale' if ptq else '_output_quantizer.scale'}"]
        dequant = torch.from_numpy(encoded.numpy().astype(np.uint32).view(np.float32))
        # Golden Stick's formula against the one of model/spec/scheme.py.
        x = torch.randn(5, weight.shape[1])
        codes = (x / smooth.float() + 7).round().clamp(-128, 127)
        expected = (codes.double() @ weight.double().T) * dequant.double() + bias.double()
        integers, scale = read_all(source, f"{theirs}.weight"), read_all(source, f"{theirs}.weight_scale")
        divisor = read_all(source, f"{theirs}.smooth_scale").float() * read_all(source, f"{theirs}.input_scale")
        zero = int(read_all(source, f"{theirs}.input_zero_point"))
        ours_codes = (x / divisor + zero).round().clamp(-128, 127)
        given = ((ours_codes - zero).double() @ integers.double().T) * scale.double().T
        assert torch.equal(scale, dequant[:, None]) and zero == 7
        torch.testing.assert_close(given, expected, rtol=1e-5, atol=1e-3)


def test_int8_cache(tmp_path: Path) -> None:
    for name, tensors, linear in (("c8", make_float(torch.float16), None), ("a16w8c8", make_rtn(), LinearScheme(packed=False))):
        tensors = add_cache(tensors)
        source = MindSporeFile(write_ckpt(tmp_path / f"{name}.ckpt", tensors), CONFIG)
        check_complete(source)
        assert read_scheme(source.config) == Scheme(linear, ignore=("lm_head",) if linear else (), kv_cache="channel")
        stored = tensors["model.layers.1.attention.infer_attention.paged_attention_mgr.value_t_scale"]
        assert torch.equal(read_all(source, "model.layers.1.self_attn.v_scale"), stored)


@pytest.mark.parametrize("kind", ["float", "rtn", "smooth_quant", "ptq"])
def test_fused_tensors_are_given_separately(tmp_path: Path, kind: str) -> None:
    tensors = {"float": make_float, "rtn": make_rtn}.get(kind, lambda: make_a8w8(ptq=kind == "ptq"))()
    fused = fuse(tensors)
    # A fused input has one divisor.
    for layer in range(2):
        for parts in FUSED.values():
            for part in parts[1:]:
                for rest in ("_input_quantizer.t_scale", "input_scale"):
                    if (name := f"model.layers.{layer}.{part}.{rest}") in tensors:
                        tensors[name] = tensors[f"model.layers.{layer}.{parts[0]}.{rest}"]
    expected = MindSporeFile(write_ckpt(tmp_path / "separate.ckpt", tensors), CONFIG)
    source = MindSporeFile(write_ckpt(tmp_path / "fused.ckpt", fused), CONFIG, fused_order="1.3")
    check_complete(source)
    check_same(source, expected)


@pytest.mark.parametrize("kind", ["float", "rtn"])
def test_biases_of_qwen_are_read_like_the_rows_of_their_linears(tmp_path: Path, kind: str) -> None:
    config, rest = {**CONFIG, "model_type": "qwen2"}, "bias" if kind == "float" else "_handler.bias"
    tensors = {"float": make_float, "rtn": make_rtn}[kind]()
    sizes = {"wq": 64, "wk": 32, "wv": 32}
    tensors |= {f"model.layers.{layer}.attention.{name}.{rest}": torch.rand(size) for layer in range(2) for name, size in sizes.items()}
    expected = MindSporeFile(write_ckpt(tmp_path / "separate.ckpt", tensors), config)
    check_complete(expected)
    for name, short in (("wq", "q"), ("wk", "k"), ("wv", "v")):
        assert torch.equal(
            read_all(expected, f"model.layers.1.self_attn.{short}_proj.bias"), tensors[f"model.layers.1.attention.{name}.{rest}"]
        )
    check_same(MindSporeFile(write_ckpt(tmp_path / "fused.ckpt", fuse(tensors)), config, fused_order="1.3"), expected)


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({}, ConfigError, "the config has to give num_attention_heads, but it is None"),
        ({"num_attention_heads": 7}, CheckpointError, "has 128 rows, which do not divide into 21 heads"),
    ],
)
def test_fused_tensors_need_heads(tmp_path: Path, config: dict[str, Any], error: type[Exception], message: str) -> None:
    file = write_ckpt(tmp_path / "x.ckpt", fuse(make_float()))
    with pytest.raises(error, match=message):
        MindSporeFile(file, config, fused_order="1.3")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention.wo._weight_quantizer.zp_neg": torch.ones(64).half()}, r"64 of 64 zero points .* are not 0"),
        ({"attention.wo._handler.weight": torch.rand(64, 64)}, "is Float32, but only Int8 can be read"),
        ({"attention.wo._weight_quantizer.scale": None}, "which is no form of Golden Stick's that can be read"),
        ({"attention.wo._layer.weight": torch.zeros(64, 64, dtype=torch.int8)}, "one linear has one weight"),
        (
            {"attention.infer_attention.paged_attention_mgr.key_t_zp": torch.eye(32)[0], "x": torch.rand(2)},
            r"1 of 32 zero points .* are not 0",
        ),
    ],
)
def test_forms_that_cannot_be_read(tmp_path: Path, changes: dict[str, torch.Tensor | None], message: str) -> None:
    tensors = add_cache(make_rtn())
    for name, tensor in changes.items():
        if tensor is None:
            del tensors[f"model.layers.0.{name}"]
        else:
            tensors[f"model.layers.0.{name}"] = tensor
    with pytest.raises(CheckpointError, match=message):
        MindSporeFile(write_ckpt(tmp_path / "x.ckpt", tensors), CONFIG)


@pytest.mark.parametrize(
    ("zero", "message"),
    [
        (torch.arange(64, dtype=torch.int8), "zero points from 0 to 63"),
        (torch.zeros(64), "is Float32, but Golden Stick 0.6 writes Int8"),
    ],
)
def test_input_zero_points_that_cannot_be_read(tmp_path: Path, zero: torch.Tensor, message: str) -> None:
    tensors = make_a8w8(ptq=False) | {"model.layers.1.attention.wk._input_quantizer.t_zp": zero}
    with pytest.raises(CheckpointError, match=message):
        MindSporeFile(write_ckpt(tmp_path / "x.ckpt", tensors), CONFIG)


def test_two_forms_in_one_file(tmp_path: Path) -> None:
    """Golden Stick falls back to A16W8 for single linears."""
    tensors = {name: tensor for name, tensor in make_a8w8(ptq=False).items() if "feed_forward.w1" not in name}
    tensors |= {name: tensor for name, tensor in make_rtn().items() if "feed_forward.w1" in name}
    source = MindSporeFile(write_ckpt(tmp_path / "x.ckpt", tensors), CONFIG)
    check_complete(source)
    scheme, plain = read_scheme(source.config), LinearScheme(packed=False)
    for ours, theirs in linear_pairs():
        expected = {"feed_forward.w1": plain, "feed_forward.w2": None}.get(ours.split(".", 3)[3], A8W8)
        assert scheme.find_linear(theirs) == expected, theirs


def dequantize(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Float weights under Hugging Face names that give the outputs of Golden Stick 1.0's int8 weights."""
    out = {"model.norm.weight": tensors["model.norm_out.weight"], "lm_head.weight": tensors["lm_head.weight"]}
    out["model.embed_tokens.weight"] = tensors["model.tok_embeddings.embedding_weight"]
    for layer in range(2):
        for ours, theirs in (("attention_norm", "input_layernorm"), ("ffn_norm", "post_attention_layernorm")):
            out[f"model.layers.{layer}.{theirs}.weight"] = tensors[f"model.layers.{layer}.{ours}.weight"]
    for ours, theirs in linear_pairs():
        weight = tensors.get(f"{ours}.weight")
        if weight is None:
            weight = tensors[f"{ours}._layer.weight"].float() * tensors[f"{ours}._layer.matmul.weight_scale"].float()[:, None]
        # (x * factors) @ weight.T
        out[f"{theirs}.weight"] = weight * tensors.get(f"{ours}._layer.matmul.smooth_scale", torch.ones(1)).float()
    return out


def make_smooth(*, dynamic: bool) -> dict[str, torch.Tensor]:
    """Golden Stick 1.0 with factors for the inputs of all linears but wk, whose inputs have none, and w2, which is float."""
    tensors = make_plain()
    tensors["model.tok_embeddings.embedding_weight"] *= 0.1
    for name, (rows, columns) in ((f"model.layers.{n}.{name}", shape) for n in range(2) for name, shape in LINEARS.items()):
        if name.endswith("w2"):
            tensors[f"{name}.weight"] = torch.randn(rows, columns) * 0.05
            continue
        tensors[f"{name}._layer.weight"] = torch.randint(-128, 128, (rows, columns), dtype=torch.int8)
        tensors[f"{name}._layer.matmul.weight_scale"] = torch.rand(rows) * 0.001 + 0.0005
        if not dynamic:
            tensors[f"{name}._layer.matmul.weight_zp"] = torch.zeros(rows)
        if not name.endswith("wk"):
            tensors[f"{name}._layer.matmul.smooth_scale"] = torch.rand(columns) + 0.5
    return tensors


@pytest.mark.parametrize("dynamic", [False, True])
def test_inputs_are_multiplied_by_smooth_scales(tmp_path: Path, run_ranks: Callable[..., list[torch.Tensor]], dynamic: bool) -> None:
    tensors = make_smooth(dynamic=dynamic)
    folder = write_ranks(tmp_path / "ranks", cut(tensors, 2))
    source = MindSporeFile(folder)
    check_complete(source)
    check_same(source, MindSporeFile(write_ckpt(tmp_path / "x.ckpt", tensors), CONFIG))
    activation = "token" if dynamic else None
    scheme = read_scheme(source.config)
    for name, theirs in linear_pairs():
        expected = None if name.endswith("w2") else LinearScheme(packed=False, activation=activation, smooth=not name.endswith("wk"))
        assert scheme.find_linear(theirs) == expected, theirs
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{k: v for k, v in CONFIG.items() if k != "model_type"}))
    model.load_state_dict(dequantize(tensors))
    ids = [1, *range(5, 20)]
    with torch.no_grad():
        expected_logits = model(torch.tensor([ids])).logits[0]

    def compute_logits(ours: LlamaForCausalLM) -> torch.Tensor:
        local = ours.logits_local(ours([Span(ours.build_cache(len(ids)), ids)]))
        return ours.collectives.gather_columns(local, ours.shares.vocab)

    (found,) = run_ranks(folder, 1, compute_logits)
    assert all(torch.equal(one, found) for one in run_ranks(folder, 2, compute_logits))
    error = (found - expected_logits).norm() / expected_logits.norm()
    assert error < (0.05 if dynamic else 1e-5)


@pytest.mark.parametrize("quantized", [False, True])
def test_biases_follow_the_rows_of_their_linears(tmp_path: Path, quantized: bool) -> None:
    tensors = make_rtn() if quantized else make_float()
    for layer in range(2):
        for name in ("attention.wq", "attention.wk", "attention.wv", "attention.wo"):
            tensors[f"model.layers.{layer}.{name}.{'_handler.bias' if quantized else 'bias'}"] = torch.randn(LINEARS[name][0])
    config = CONFIG | {"attention_bias": True}
    whole = MindSporeFile(write_ckpt(tmp_path / "x.ckpt", tensors), config)
    check_complete(whole)
    for ours, theirs in linear_pairs():
        if "attention" in ours:
            bias = tensors[f"{ours}.{'_handler.bias' if quantized else 'bias'}"]
            assert torch.equal(read_all(whole, f"{theirs}.bias"), bias)
    ranks = write_ranks(tmp_path / "ranks", cut(tensors, 2))
    check_same(MindSporeFile(ranks, config), whole)
    for order, fused in (("1.3", fuse(tensors)), ("1.4", interleave(fuse(tensors), 4, 2))):
        check_same(MindSporeFile(write_ckpt(tmp_path / f"{order}.ckpt", fused), config, fused_order=order), whole)
    folder = write_ranks(tmp_path / "fused", [interleave(fuse(part), 2, 1) for part in cut(tensors, 2)])
    check_same(MindSporeFile(folder, config, fused_order="1.4"), whole)


# ---- folders of ranks


@pytest.mark.parametrize("kind", ["float", "rtn", "smooth_quant", "ptq"])
@pytest.mark.parametrize("vocabulary", [False, True])
def test_rank_folders_are_joined(tmp_path: Path, kind: str, vocabulary: bool) -> None:
    tensors = {"float": make_float, "rtn": lambda: add_cache(make_rtn())}.get(kind, lambda: make_a8w8(ptq=kind == "ptq"))()
    expected = MindSporeFile(write_ckpt(tmp_path / "whole.ckpt", tensors), CONFIG)
    folder = write_ranks(tmp_path / "ranks", cut(tensors, 2, vocabulary=vocabulary))
    source = MindSporeFile(folder)
    check_complete(source)
    check_same(source, expected)
    assert source.tokenizer_path() == folder


def test_rank_folders_fused_after_slicing(tmp_path: Path) -> None:
    tensors = make_rtn()
    expected = MindSporeFile(write_ckpt(tmp_path / "whole.ckpt", tensors), CONFIG)
    ranks = write_ranks(tmp_path / "ranks", [fuse(part) for part in cut(tensors, 2)])
    check_same(MindSporeFile(ranks, fused_order="1.3"), expected)


def test_one_rank_folder(tmp_path: Path) -> None:
    tensors = make_float()
    expected = MindSporeFile(write_ckpt(tmp_path / "whole.ckpt", tensors), CONFIG)
    check_same(MindSporeFile(write_ranks(tmp_path / "ranks", [tensors])), expected)


def test_folders_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds neither a \.ckpt file nor folders rank_0"):
        MindSporeFile(tmp_path, CONFIG)
    with pytest.raises(CheckpointError, match="is not a file"):
        MindSporeFile(tmp_path / "absent.ckpt", CONFIG)
    first, second = cut(make_rtn(), 2)
    folder = write_ranks(tmp_path / "ranks", [first, second])

    def check(message: str, changes: dict[str, torch.Tensor]) -> None:
        write_ckpt(folder / "rank_1" / "checkpoint_1.ckpt", second | changes)
        with pytest.raises(CheckpointError, match=message):
            MindSporeFile(folder)

    scale = "model.layers.0.attention.wo._weight_quantizer.scale"
    weight = "model.layers.0.attention.wo._handler.weight"
    check(r"wo._handler.weight has the shapes \[64, 32\] and \[63, 32\] in 2 files", {weight: second[weight][:63].contiguous()})
    check(r"checkpoint_1\.ckpt holds extra, but .*checkpoint_0\.ckpt does not", {"extra": torch.rand(2)})
    check(f"{scale} differs in 2 files", {scale: torch.rand(64).half()})
    check(rf"{scale} is Float16 \[64\] in .*, but Float32 \[64\]", {scale: torch.rand(64)})
    check(r"norm_out.weight has the shapes \[64\] and \[32\] in 2 files", {"model.norm_out.weight": torch.rand(32)})
    (folder / "rank_1" / "checkpoint_1.ckpt").rename(folder / "rank_0" / "again.ckpt")
    with pytest.raises(CheckpointError, match=r"rank_1 holds no \.ckpt and no \.safetensors file"):
        MindSporeFile(folder)
    write_ckpt(folder / "rank_1" / "checkpoint_1.ckpt", second)
    with pytest.raises(CheckpointError, match=r"again\.ckpt and checkpoint_0\.ckpt both hold lm_head"):
        MindSporeFile(folder)
    (folder / "rank_0").rename(folder / "rank_2")
    with pytest.raises(CheckpointError, match="holds rank_2, but no rank_0"):
        MindSporeFile(folder)
