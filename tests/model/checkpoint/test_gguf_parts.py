"""GGUF checkpoints split over several files by the gguf library, read like one file or refused."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind

from model.checkpoint.formats import open_checkpoint
from model.checkpoint.gguf_file import GgufFile
from parallel.errors import CheckpointError
from parallel.file_slices import FileReader
from tests.model.gguf_blocks import write_blocks


def choose(name: str) -> Kind:
    return Kind.Q6_K if "output" in name else Kind.Q4_K


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> GgufFile:
    return GgufFile(write_blocks(tmp_path_factory.mktemp("whole") / "m.gguf", choose))


@pytest.fixture
def first(tmp_path: Path) -> Path:
    """The first of five parts."""
    path = write_blocks(tmp_path / "m.gguf", choose, part_tensors=5)
    assert path.name == "m-00001-of-00005.gguf"
    return path


@pytest.mark.parametrize("given", ["first", "third", "folder"])
def test_a_split_file_equals_the_whole_one(whole: GgufFile, first: Path, given: str) -> None:
    path = {"first": first, "third": first.with_name("m-00003-of-00005.gguf"), "folder": first.parent}[given]
    source, reader = open_checkpoint(path), FileReader()
    assert source.path == first and len(source.files) == 5
    assert source.config == whole.config and dict(source.tensors) == whole.tensors
    for name, info in source.tensors.items():
        rows = info.shape[0]
        assert torch.equal(source.read_rows(reader, name, 1, rows), whole.read_rows(reader, name, 1, rows)), name


def rename(folder: Path) -> None:
    (folder / "m-00003-of-00005.gguf").rename(folder / "other.gguf")


def swap(folder: Path) -> None:
    second, third = folder / "m-00002-of-00005.gguf", folder / "m-00003-of-00005.gguf"
    second.rename(folder / "x")
    third.rename(second)
    (folder / "x").rename(third)


def cut(folder: Path) -> None:
    path = folder / "m-00004-of-00005.gguf"
    path.write_bytes(path.read_bytes()[:-100])


def replace_count(folder: Path) -> None:
    path = folder / "m-00001-of-00005.gguf"
    content, key = path.read_bytes(), b"split.tensors.count"
    place = content.index(key) + len(key) + 4
    path.write_bytes(content[:place] + np.uint32(7).tobytes() + content[place + 4 :])


def mix(folder: Path) -> None:
    other = write_blocks(folder / "n.gguf", choose, part_tensors=4)
    for path in sorted(other.parent.glob("n-*")):
        path.unlink() if "00002" not in path.name else path.rename(folder / "m-00002-of-00005.gguf")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (rename, r"lacks 1 of the 5 parts: m-00003-of-00005\.gguf; copy them"),
        (swap, r"m-00002-of-00005\.gguf: split\.no is 2, but its name needs 1: copy all parts"),
        (cut, r"m-00004-of-00005\.gguf has \d+ bytes, but .* reaches byte \d+: copy it again"),
        (replace_count, r"split\.tensors\.count is 7, but its 5 parts hold 21"),
        (mix, r"m-00002-of-00005\.gguf: split\.count is 6, but its name needs 5"),
    ],
)
def test_parts_that_do_not_belong_together_are_refused(first: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(first.parent)
    with pytest.raises(CheckpointError, match=message):
        GgufFile(first)


def test_a_part_under_another_name_is_refused(tmp_path: Path, first: Path) -> None:
    shutil.copy(first, tmp_path / "model.gguf")
    with pytest.raises(CheckpointError, match=r"is one of 5 parts, which are found by their names: .* NAME-00001-of-00005\.gguf"):
        GgufFile(tmp_path / "model.gguf")


def test_two_split_files_in_one_folder_are_refused(tmp_path: Path, first: Path) -> None:
    write_blocks(tmp_path / "other.gguf", choose, part_tensors=15)
    with pytest.raises(CheckpointError, match="holds 7 GGUF files: give one of them"):
        open_checkpoint(tmp_path)
