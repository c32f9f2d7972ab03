"""What cannot be read is named: other formats, quantizations, heads, adapters, parts and failed downloads."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from model.checkpoint.formats import open_checkpoint
from model.spec.file_kind import describe_file
from parallel.errors import CheckpointError, InputError

SIZES: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 32,
}

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"


def write_folder(folder: Path, changes: dict[str, Any], **files: bytes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"x": torch.zeros(1)}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(SIZES | changes))
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_bytes(content)
    return folder


def refuse(path: Path, words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        open_checkpoint(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


METHODS = {
    "bitsandbytes": "bitsandbytes",
    "hqq": "HQQ",
    "eetq": "EETQ",
    "torchao": "torchao",
    "aqlm": "AQLM",
    "exl2": "exl2",
    "exl3": "exl3",
    "mxfp4": "MXFP4",
    "quanto": "Quanto",
    "modelopt_fp4": "ModelOpt FP4",
}


@pytest.mark.parametrize("method", METHODS)
def test_a_quantization_that_is_not_supported_is_named(tmp_path: Path, method: str) -> None:
    folder = write_folder(tmp_path / "m", {"quantization_config": {"quant_method": method}})
    refuse(folder, rf"holds .*{METHODS[method]}.* weights .*, which are not supported; supported: compressed-tensors")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"quantization": {"group_size": 64, "bits": 4, "mode": "affine"}},
            r"holds MLX quantized weights \(quantization in config",
        ),
        ({"quantization_config": {"load_in_4bit": True}}, "holds bitsandbytes weights"),
        (
            {
                "quantization_config": {
                    "quant_method": "compressed-tensors",
                    "format": "mxfp4-pack-quantized",
                    "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"type": "float", "num_bits": 4}}},
                }
            },
            r"holds MXFP4 weights \(compressed-tensors format 'mxfp4-pack-quantized'\)",
        ),
        (
            {
                "quantization_config": {
                    "quant_method": "compressed-tensors",
                    "config_groups": {"g": {"format": "nvfp4-pack-quantized", "weights": {"type": "float", "num_bits": 4}}},
                }
            },
            r"holds NVFP4 weights \(compressed-tensors format 'nvfp4-pack-quantized'\)",
        ),
        ({"architectures": ["LlamaForCausalLMEagle3"]}, r"is an EAGLE draft head \('LlamaForCausalLMEagle3'\), not a model"),
        ({"model_type": "eagle"}, "is an EAGLE draft head"),
        ({"draft_vocab_size": 32000}, r"is an EAGLE draft head \(draft_vocab_size\)"),
        ({"medusa_num_heads": 4}, "is a Medusa draft head"),
    ],
)
def test_what_the_config_tells_is_named(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    refuse(write_folder(tmp_path / "m", changes), words)


def test_an_adapter_next_to_a_model_is_not_left_out_silently(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", {}, adapter_config__json=b"{}", adapter_model__safetensors=b"")
    refuse(folder, "holds a LoRA adapter next to a model: merge it")


@pytest.mark.parametrize("name", ["consolidated.00.pth", "model.safetensors.index.json"])
def test_a_pointer_in_place_of_any_part_is_named(tmp_path: Path, name: str) -> None:
    folder = write_folder(tmp_path / "m", {})
    if name.endswith(".pth"):
        (folder / "config.json").unlink()
        (folder / "params.json").write_text('{"dim": 32, "n_layers": 1, "n_heads": 2, "norm_eps": 1e-5}')
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(LFS)
    with pytest.raises(InputError, match=f"{name} is a Git LFS pointer, not the file itself"):
        open_checkpoint(folder)


def test_modelopt_is_named_by_the_file_that_it_adds(tmp_path: Path) -> None:
    quantization = json.dumps({"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4"}}).encode()
    refuse(
        write_folder(tmp_path / "m", {}, hf_quant_config__json=quantization),
        r"hf_quant_config\.json: ModelOpt 'NVFP4' weights are not supported; there are FP8",
    )


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("adapter_config.json", "adapter_model.safetensors"), "is a LoRA adapter for org/base, not a model: merge it"),
        (("config.json", "adapter_config.json", "adapter_model.safetensors"), "is a LoRA adapter"),
        (("pytorch_model.bin",), r"holds pytorch_model\.bin, but no config\.json: copy the whole checkpoint"),
        (("config.json", "tf_model.h5"), "holds a TensorFlow checkpoint"),
        (("config.json", "flax_model.msgpack"), "holds a Flax checkpoint"),
        (("config.json", "model.onnx"), "holds an ONNX model"),
        (("qmodel.pt", "config.json"), "holds HQQ weights"),
        (("weights.npz", "config.json"), "holds MLX weights"),
        (("config.json", "tokenizer.json"), r"holds config\.json, but no weights"),
        (("params.json",), r"holds params\.json, but no consolidated\.NN\.pth"),
        (("other.safetensors",), r"holds safetensors files, but no config\.json"),
        (("a-00001-of-00003.gguf", "a-00002-of-00003.gguf"), "is no whole part of a split GGUF file of 3 parts: download it again"),
        (("a.gguf", "b.gguf"), r"holds 2 GGUF files: give one of them, such as a\.gguf"),
        (("snapshots/abc/config.json", "refs/main"), "holds no checkpoint itself: give .*snapshots/abc"),
        (("checkpoint/rank_0/x.ckpt", "log/info.log"), "holds no checkpoint itself: give .*/checkpoint$"),
        (("ckpt_strategy_rank_0.ckpt", "a.yaml"), "holds strategy files of MindSpore, which tell how ranks were cut and hold no weights"),
        (("one/config.json", "two/config.json"), "holds no checkpoint itself: give .*/one, one of 2 such folders"),
        ((), "is an empty folder"),
    ],
)
def test_a_folder_is_named_by_its_files(tmp_path: Path, names: tuple[str, ...], words: str) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text('{"base_model_name_or_path": "org/base"}')
    refuse(folder, words)


CONTENTS = [
    (LFS, "is a Git LFS pointer, not the file itself"),
    (b"<!DOCTYPE html><html><title>404</title>", "is a web page, not the file"),
    (b"\n <HTML>", "is a web page"),
    (b"", "is empty"),
    (bytes(600), "begins with 512 zero bytes"),
    (b"\x1f\x8b\x08", "is a gzip archive"),
    (b"ggjt" + bytes(20), "is a GGJT file"),
    (b"\x89HDF\r\n", "is an HDF5 file"),
    (b"x" * 257 + b"ustar", "is a tar archive"),
]


@pytest.mark.parametrize(("content", "words"), CONTENTS)
@pytest.mark.parametrize("name", ["model.gguf", "m.ckpt", "m.bin"])
def test_a_file_is_named_by_its_content(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    refuse(tmp_path / name, words)


@pytest.mark.parametrize(("content", "words"), CONTENTS[:4])
def test_what_stands_where_weights_or_settings_should_is_named(tmp_path: Path, content: bytes, words: str) -> None:
    folder = write_folder(tmp_path / "m", {})
    (folder / "model.safetensors").write_bytes(content)
    if content:
        with pytest.raises(CheckpointError, match=rf"model\.safetensors {words}"):
            open_checkpoint(folder)
    save_file({"x": torch.zeros(1)}, folder / "model.safetensors")
    (folder / "config.json").write_bytes(content)
    with pytest.raises(InputError, match=rf"config\.json {words}"):
        open_checkpoint(folder)


def test_a_strategy_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "ckpt_strategy.ckpt").write_bytes(b"\x08\x00\x12\x04abcd")
    refuse(tmp_path / "ckpt_strategy.ckpt", "is one of the strategy files of MindSpore, which tell how ranks were cut and hold no weights")


def test_files_of_torch_and_numpy_are_named_by_their_use(tmp_path: Path) -> None:
    torch.save({"state_dict": {}}, tmp_path / "epoch=3.ckpt")
    refuse(tmp_path / "epoch=3.ckpt", "is a file of torch.save, as PyTorch Lightning writes")
    (tmp_path / "epoch=3.ckpt").unlink()
    torch.save({}, tmp_path / "pytorch_model.bin")
    refuse(tmp_path / "pytorch_model.bin", "is a file of torch.save: give its folder")
    np.savez(tmp_path / "weights.npz", a=np.zeros(2))
    refuse(tmp_path / "weights.npz", "is a NumPy archive")
    (tmp_path / "model.onnx").write_bytes(b"\x08\x07\x12\x07pytorch")
    refuse(tmp_path / "model.onnx", "is an ONNX model")
    save_file({"x": torch.zeros(1)}, tmp_path / "alone.safetensors")
    refuse(tmp_path / "alone.safetensors", r"is a safetensors file without a config\.json")


@settings(max_examples=200, deadline=None)
@given(content=st.binary(max_size=700))
def test_any_bytes_are_described_or_not_but_never_an_error(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "bytes"
    path.write_bytes(content)
    words = describe_file(path)
    assert words is None or (words.isprintable() and words.split()[0] in ("is", "begins"))
