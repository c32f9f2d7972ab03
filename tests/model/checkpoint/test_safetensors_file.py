"""safetensors files against the safetensors library, and what is said of files that are broken."""

import hashlib
import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.checkpoint.hf_folder import HuggingFaceFolder
from model.checkpoint.safetensors_file import SafetensorsWriter, read_header
from model.spec.tensor_info import TensorInfo
from parallel.element_type import ElementType
from parallel.errors import CheckpointError
from parallel.file_slices import FileReader

DTYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
)


def make_tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    tensors = {str(dtype).removeprefix("torch."): (torch.randn(7, 5) * 50).to(dtype) for dtype in DTYPES}
    return {**tensors, "vector": torch.randn(11), "scalar": torch.tensor(4.5), "cube": torch.randn(3, 2, 4), "empty": torch.empty(0, 3)}


def write(path: Path, tensors: dict[str, torch.Tensor]) -> str:
    with SafetensorsWriter(path, {name: TensorInfo.of(t) for name, t in tensors.items()}) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    return writer.sha256


def test_a_file_of_the_library_is_read_row_by_row(tmp_path: Path) -> None:
    tensors, path = make_tensors(), tmp_path / "a.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    header = read_header(path)
    assert set(header) == set(tensors)
    for name, tensor in tensors.items():
        stored, rows = header[name], tensor.shape[0] if tensor.shape else 1
        assert (stored.info.shape, stored.info.dtype.torch_dtype) == (tuple(tensor.shape), tensor.dtype)
        for start, stop in {(0, rows), (rows // 3, rows), (0, rows // 2)}:
            found = FileReader().read_rows([stored.stored_rows(path)], start, stop)
            assert torch.equal(found, tensor.reshape(rows, *tensor.shape[1:])[start:stop]), name


def test_the_library_reads_what_was_written(tmp_path: Path) -> None:
    tensors, path = make_tensors(), tmp_path / "a.safetensors"
    sha256 = write(path, tensors)
    found = load_file(path)
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    assert sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_tensor_that_is_not_contiguous_is_written_in_order(tmp_path: Path) -> None:
    tensor = torch.arange(12).view(3, 4).T
    write(tmp_path / "a.safetensors", {"a": tensor})
    assert torch.equal(load_file(tmp_path / "a.safetensors")["a"], tensor)


def test_a_writer_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    infos = {name: TensorInfo((2,), ElementType.FLOAT32) for name in "ab"}
    with pytest.raises(ZeroDivisionError), SafetensorsWriter(tmp_path / "a.safetensors", infos) as writer:
        writer.write("a", torch.zeros(2))
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_a_file_with_a_tensor_left_out_is_not_kept(tmp_path: Path) -> None:
    infos = {name: TensorInfo((2,), ElementType.FLOAT32) for name in "ab"}
    with pytest.raises(AssertionError, match="b"), SafetensorsWriter(tmp_path / "a.safetensors", infos) as writer:
        writer.write("a", torch.zeros(2))
    assert list(tmp_path.iterdir()) == []


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"a\.safetensors does not exist"):
        read_header(tmp_path / "a.safetensors")


@pytest.mark.parametrize("kept", [1, 200])
def test_a_truncated_file_is_named_with_its_size(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"first": torch.zeros(4), "last": torch.zeros(100)}, path)
    size = path.stat().st_size - kept
    path.write_bytes(path.read_bytes()[:-kept])
    with pytest.raises(CheckpointError, match=rf"a\.safetensors is truncated: it has {size} bytes, last ends at byte {size + kept}"):
        read_header(path)


@pytest.mark.parametrize("content", [b"", b"abc", struct.pack("<Q", 8), struct.pack("<Q", 10) + b"{}", b"\xff" * 40])
def test_a_file_that_ends_within_its_header_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"a\.safetensors is no whole safetensors file: it has {len(content)} bytes"):
        read_header(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"dtype": "F4", "shape": [2], "data_offsets": [0, 8]}, r"x has type F4 \(FP4\), which is not supported"),
        ({"dtype": "F32", "shape": [2]}, "the header entry of x cannot be read"),
        ({"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}, r"x has 8 bytes, but its shape \[3\] in F32 needs 12"),
        ("nothing", "the header entry of x cannot be read"),
    ],
)
def test_a_header_that_contradicts_itself_is_refused(tmp_path: Path, entry: object, words: str) -> None:
    text = json.dumps({"x": entry}).encode()
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    with pytest.raises(CheckpointError, match=words):
        read_header(tmp_path / "a.safetensors")


@pytest.mark.parametrize("text", [b"not json", b"\xff\xfe{}", b"[1, 2]", b'"words"'])
def test_a_header_that_is_no_json_object_is_refused(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    with pytest.raises(CheckpointError, match=r"a\.safetensors"):
        read_header(tmp_path / "a.safetensors")


def write_index(folder: Path, weight_map: object) -> None:
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_a_folder_of_several_files_is_read_through_its_index(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(4, 2), "b": torch.randn(3)}
    for name, tensor in tensors.items():
        save_file({name: tensor}, tmp_path / f"{name}.safetensors")
    write_index(tmp_path, {name: f"{name}.safetensors" for name in tensors})
    folder = HuggingFaceFolder(tmp_path)
    assert set(folder.tensors) == {"a", "b"} and folder.tokenizer_path() == tmp_path
    assert torch.equal(folder.read_rows(FileReader(), "a", 1, 3), tensors["a"][1:3])
    assert torch.equal(folder.read_rows(FileReader(), "b", 0, 3), tensors["b"])


def test_an_index_that_does_not_fit_its_files_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.randn(4, 2)}, tmp_path / "a.safetensors")
    write_index(tmp_path, {"a": "a.safetensors", "b": "a.safetensors"})
    with pytest.raises(CheckpointError, match=r"lists 1 of 2 tensors that are not in the files it names, b in a.safetensors first"):
        HuggingFaceFolder(tmp_path)
    write_index(tmp_path, {"a": "a.safetensors", "b": "b.safetensors"})
    with pytest.raises(CheckpointError, match=r"lacks 1 of its 2 files: b\.safetensors"):
        HuggingFaceFolder(tmp_path)
    write_index(tmp_path, [1])
    with pytest.raises(CheckpointError, match="has no readable weight_map"):
        HuggingFaceFolder(tmp_path)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"holds no weights: neither model\.safetensors nor other"):
        HuggingFaceFolder(tmp_path)
