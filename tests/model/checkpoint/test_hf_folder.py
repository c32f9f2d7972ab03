"""Hugging Face folders with one damage each, in a header, the index, a link or the checksums, and what is said of it."""

import hashlib
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from model.checkpoint.checksum_file import CHECKSUM_FILE, read_sha256sums, write_sha256sums
from model.checkpoint.column_packed import ColumnFolder
from model.checkpoint.formats import OpenOptions, open_checkpoint
from model.checkpoint.gptq_folder import GptqFolder
from model.checkpoint.hf_folder import INDEX_FILE, SINGLE_FILE, HuggingFaceFolder
from model.checkpoint.safetensors_file import read_header
from model.checkpoint.source import Checksum
from model.spec.config import read_config
from parallel.errors import CheckpointError, ConfigError

PARTS = {name: f"model-0000{number}-of-00003.safetensors" for number, name in enumerate("abc", 1)}


def entry(begin: int, end: int, shape: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def build_file(header: dict[str, Any] | str, content: int) -> bytes:
    """A safetensors file of this header and `content` bytes of elements."""
    text = header.encode() if isinstance(header, str) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(content)


def write_parts(folder: Path, **changes: str) -> Path:
    """Three files of a tensor each, a to c, and their index; `changes` gives a tensor another file in the index."""
    for name, file in PARTS.items():
        save_file({name: torch.ones(4)}, folder / file)
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": PARTS | changes}))
    (folder / "config.json").write_text("{}")
    return folder


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (build_file('{"x":%s,"x":%s}' % ((json.dumps(entry(0, 8, [2])),) * 2), 8), "its header holds x twice: copy it again"),
        (build_file('{"x":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}', 8), "its header holds dtype twice"),
        (build_file({"x": entry(0, 8, [2.0])}, 8), r"the header entry of x cannot be read: \{.*2\.0"),
        (build_file({"x": entry(0, 4, [True])}, 4), "the header entry of x cannot be read"),
        (build_file({"x": entry(0, 8, [-1, -2])}, 8), "the header entry of x cannot be read"),
        (build_file({"x": entry(0, 8, "2")}, 8), "the header entry of x cannot be read"),
        (build_file({"x": entry(0, 4, {})}, 4), "the header entry of x cannot be read"),
        (build_file({"x": entry(0, 4, [1] * 65)}, 4), "the header entry of x cannot be read"),
        (build_file({"x": entry(-8, 0, [2])}, 8), "the header entry of x cannot be read"),
        (build_file({"x": entry(0, 8, [10**4000] * 3)}, 8), "the header entry of x cannot be read"),
        (
            build_file({"x": entry(0, 8, [2], "F6_E3M2")}, 8),
            r"x has type F6_E3M2 \(FP6\), which is not supported; types are F64, F32",
        ),
        (build_file({"x": entry(0, 8, [2], ["F32"])}, 8), "the header entry of x cannot be read"),
        (build_file({"x": entry(8, 0, [2])}, 8), r"x has -8 bytes, but its shape \[2\] in F32 needs 8"),
        (build_file({"x": entry(0, 8, [1 << 62, 1 << 62])}, 8), rf"x has 8 bytes, but its shape .* needs {1 << 126}"),
        (build_file({"x": entry(0, 8, [2]), "y": entry(4, 12, [2])}, 12), r"y begins at byte \d+, but the one before ends at \d+"),
        (build_file({"x": entry(0, 8, [2]), "y": entry(12, 20, [2])}, 20), r"y begins at byte \d+, but the one before ends at \d+"),
        (build_file({"x": entry(0, 8, [2])}, 12), r"has \d+ bytes, but its tensors end at byte \d+: copy it again"),
        (build_file({"x": entry(0, 8, [2])}, 7), r"is truncated: it has \d+ bytes, x ends at byte \d+"),
        (build_file({"x\ny": entry(0, 8, [2])}, 8), r"its header names a tensor 'x\\ny', which cannot be a name"),
        (build_file({"\ud800": entry(0, 8, [2])}, 8), r"its header names a tensor '\\ud800', which cannot be a name"),
        (build_file({"x" * 5000: entry(0, 8, [2])}, 8), r"names a tensor 'x{40,60}\.\.\.x{40,60}', which cannot be a name"),
        (build_file("[" * 100_000, 0), "cannot be read as safetensors: maximum recursion depth"),
        (build_file('{"x":' * 100_000, 0), "cannot be read as safetensors: maximum recursion depth"),
        (build_file('{"x":1' + "0" * 5000 + "}", 0), "cannot be read as safetensors: Exceeds the limit"),
        (build_file(" {}", 0), "its header begins with ' ' instead of '{'"),
        (build_file("", 0), "cannot be read as safetensors"),
        (struct.pack("<Q", 8) + "{}".encode("utf-16-le") * 2, "cannot be read as safetensors"),
        (struct.pack("<Q", 1 << 60) + b"{}", rf"it has 10 bytes, its header alone needs {(1 << 60) + 8}, and 100000000 are the most"),
    ],
)
def test_a_damaged_header_is_refused_with_what_was_found(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"x\.safetensors.* {message}"):
        read_header(path)


@pytest.mark.parametrize(
    "file", ["../x.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "..", "", "x\\y.safetensors", "config.json"]
)
def test_an_index_names_safetensors_files_of_its_folder_only(tmp_path: Path, file: str) -> None:
    with pytest.raises(CheckpointError, match=r"index\.json names '.*', which is no safetensors file of its folder"):
        HuggingFaceFolder(write_parts(tmp_path, b=file))


def test_missing_files_are_counted_and_named(tmp_path: Path) -> None:
    write_parts(tmp_path)
    for name in "ac":
        (tmp_path / PARTS[name]).unlink()
    with pytest.raises(CheckpointError, match=rf"lacks 2 of its 3 files: {PARTS['a']}, {PARTS['c']}; copy them"):
        HuggingFaceFolder(tmp_path)


def test_a_tensor_in_two_files_is_refused_with_both(tmp_path: Path) -> None:
    write_parts(tmp_path)
    save_file({"a": torch.ones(4), "b": torch.ones(4)}, tmp_path / PARTS["b"])
    with pytest.raises(CheckpointError, match=rf"a is in both .*{PARTS['a']} and .*{PARTS['b']}: remove the file that is not needed"):
        HuggingFaceFolder(tmp_path)


def test_a_tensor_in_another_file_than_the_index_says_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"lists 1 of 3 tensors that are not in the files it names, a in {PARTS['b']} first"):
        HuggingFaceFolder(write_parts(tmp_path, a=PARTS["b"]))


def test_a_folder_without_config_takes_the_values_of_the_yaml(tmp_path: Path) -> None:
    """MindFormers loads Hugging Face's safetensors with its own YAML."""
    names = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    save_file({name: torch.zeros(4, 2, dtype=torch.bfloat16) for name in names}, tmp_path / SINGLE_FILE)
    with pytest.raises(ConfigError, match=r"config\.json does not exist"):
        open_checkpoint(tmp_path)
    source = open_checkpoint(tmp_path, OpenOptions(values={"hidden_size": 2}))
    assert source.config == {"hidden_size": 2, "torch_dtype": "bfloat16"}
    (tmp_path / "config.json").write_text('{"hidden_size": 3}')
    assert open_checkpoint(tmp_path, OpenOptions(values={"hidden_size": 2})).config == {"hidden_size": 3}


def link_to_outside(folder: Path) -> None:
    (folder.parent / "outside.safetensors").write_bytes((folder / SINGLE_FILE).read_bytes())
    (folder / SINGLE_FILE).unlink()
    (folder / SINGLE_FILE).symlink_to("../outside.safetensors")


def link_to_inside(folder: Path) -> None:
    (folder / SINGLE_FILE).rename(folder / "weights.safetensors")
    (folder / SINGLE_FILE).symlink_to("weights.safetensors")


def link_to_blob(folder: Path, repository: str = ".") -> None:
    blobs = folder.parent.parent / repository / "blobs"
    blobs.mkdir(parents=True)
    (folder / SINGLE_FILE).rename(blobs / "0a1b")
    (folder / SINGLE_FILE).symlink_to(os.path.relpath(blobs / "0a1b", folder))


@pytest.mark.parametrize(
    ("link", "is_read"),
    [
        (link_to_inside, True),
        (link_to_blob, True),
        (link_to_outside, False),
        (lambda folder: link_to_blob(folder, "../other-model"), False),
    ],
    ids=["inside", "hub cache", "outside", "blobs of another model"],
)
def test_a_link_may_not_lead_out_of_the_checkpoint(tmp_path: Path, link: Callable[[Path], None], is_read: bool) -> None:
    folder = tmp_path / "models--org--one" / "snapshots" / "revision"
    folder.mkdir(parents=True)
    save_file({"x": torch.ones(4)}, folder / SINGLE_FILE)
    (folder / "config.json").write_text("{}")
    link(folder)
    if is_read:
        assert set(HuggingFaceFolder(folder).tensors) == {"x"}
        return
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors is a link out of its folder, to .*: copy the file here, or give --follow-links"
    ):
        HuggingFaceFolder(folder)
    assert set(HuggingFaceFolder(folder, follow_links=True).tensors) == {"x"}


def test_the_only_file_of_a_folder_may_not_be_a_link_out_of_it_under_any_name(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    save_file({"x": torch.ones(4)}, tmp_path / "outside.safetensors")
    (folder / "gptq.safetensors").symlink_to(tmp_path / "outside.safetensors")
    with pytest.raises(CheckpointError, match=r"gptq\.safetensors is a link out of its folder"):
        ColumnFolder(folder)
    assert set(ColumnFolder(folder, follow_links=True).tensors) == {"x"}


def test_checksums_are_read_for_the_weight_files(tmp_path: Path) -> None:
    write_parts(tmp_path)
    hashes = {file: hashlib.sha256((tmp_path / file).read_bytes()).hexdigest() for file in PARTS.values()}
    write_sha256sums(tmp_path, hashes)
    source = HuggingFaceFolder(tmp_path)
    assert list(source.files) == [tmp_path / file for file in PARTS.values()]
    assert source.checksums == {tmp_path / file: Checksum("sha256", value, CHECKSUM_FILE) for file, value in hashes.items()}
    first, second = list(hashes)[:2]
    (tmp_path / CHECKSUM_FILE).write_text(f"{hashes[first].upper()} *{first}\n\n{hashes[second]}  ./{second}\n{'0' * 64}  other.bin\n")
    assert {file.name: one.value for file, one in read_sha256sums(tmp_path, source.files).items()} == {
        name: hashes[name] for name in (first, second)
    }


@pytest.mark.parametrize("line", ["abc  model.safetensors", "0" * 64, "0" * 64 + " model.safetensors", "\x00\xff" * 9])
def test_a_damaged_line_of_checksums_is_refused_with_its_number(tmp_path: Path, line: str) -> None:
    write_parts(tmp_path)
    (tmp_path / CHECKSUM_FILE).write_text(f"{'0' * 64}  {PARTS['a']}\n{line}\n")
    with pytest.raises(CheckpointError, match="SHA256SUMS, line 2: 64 hexadecimal digits and a file name are needed"):
        HuggingFaceFolder(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "is not JSON: maximum recursion depth"),
        ('{"a": 1' + "0" * 5000 + "}", "is not JSON: Exceeds the limit"),
        ("\ufeff{}", "is not JSON"),
        ("[]", "holds a list, but a JSON object is needed"),
        (" " * ((1 << 24) + 1), "cannot be read: it has 16777217 bytes, but at most 16777216 are read"),
    ],
)
def test_settings_that_are_no_json_object_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=rf"config\.json {message}"):
        read_config(tmp_path / "config.json")
    with pytest.raises(ConfigError, match="it is a folder, but a regular file is needed"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ([4], r"quantization_config is \[4\], but an object is needed"),
        ({"bits": 4.0}, r"weights of 4\.0 bits are not supported"),
        ({"bits": [4]}, r"weights of \[4\] bits are not supported"),
        ({"group_size": 1 << 40}, f"group_size is {1 << 40}, but a whole number from 1"),
        ({"group_size": True}, "group_size is True, but a whole number"),
        ({"sym": "false"}, "sym is 'false', but true or false is needed"),
        ({"desc_act": 1}, "desc_act is 1, but true or false is needed"),
        ({"dynamic": ["-:.*"]}, r"dynamic is \['-:\.\*'\], but an object is needed"),
        ({"checkpoint_format": {"a": 1}}, r"checkpoint_format \{'a': 1\} is not supported"),
    ],
)
def test_settings_of_gptq_of_a_wrong_type_are_refused_with_key_and_value(tmp_path: Path, settings: Any, message: str) -> None:
    save_file({"x.qweight": torch.ones(4, 32).int()}, tmp_path / SINGLE_FILE)
    if isinstance(settings, dict):
        settings = {"quant_method": "gptq", "bits": 4, "group_size": 16, **settings}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": settings}))
    with pytest.raises(ConfigError, match=message):
        GptqFolder(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x.qweight": torch.ones(0, 32).int()}, r"x\.qweight is int32 \[0, 32\], but int32 of 2 dimensions is needed"),
        ({"x.bias": torch.zeros(7).half()}, r"x\.bias is float16 \[7\], but float16 \[32\] belongs to this qweight"),
        ({"x.weight_scale": torch.ones(3)}, r"holds both x\.qweight and x\.weight_scale: give the checkpoint as it was written"),
    ],
)
def test_quantized_tensors_that_contradict_each_other_are_refused(tmp_path: Path, change: dict[str, torch.Tensor], message: str) -> None:
    tensors = {"x.qweight": torch.ones(4, 32).int(), "x.scales": torch.ones(2, 32).half(), "x.qzeros": torch.ones(2, 4).int()}
    save_file(tensors | change, tmp_path / SINGLE_FILE)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 32}
    settings = {"quant_method": "gptq", "bits": 4, "group_size": 16}
    (tmp_path / "config.json").write_text(json.dumps(sizes | {"quantization_config": settings}))
    with pytest.raises(CheckpointError, match=message):
        GptqFolder(tmp_path)
