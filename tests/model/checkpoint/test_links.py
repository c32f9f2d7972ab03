"""Links among the weight files of a folder: only those that stay in it are followed, unless the user permits others."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from model.checkpoint.formats import OpenOptions, open_checkpoint
from parallel.errors import CheckpointError

if TYPE_CHECKING:
    from tests.model.checkpoint.conftest import Checkpoint

FOLDERS = (
    "hf",
    "hf-indexed",
    "gptq",
    "awq",
    "gguf",
    "mindspore",
    "mindformers-safetensors",
    "mindformers-ranks",
    "modelslim",
    "ranks",
    "meta",
)


@pytest.fixture(params=FOLDERS)
def copied(request: pytest.FixtureRequest, make_checkpoint: Callable[[str], "Checkpoint"], tmp_path: Path) -> tuple[Path, Path]:
    """A folder of each format, and one of its weight files."""
    checkpoint = make_checkpoint(request.param)
    folder = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
    shutil.copytree(folder, tmp_path / "model")
    file = max(checkpoint.weights)
    return tmp_path / "model", tmp_path / "model" / file.relative_to(folder)


def test_a_link_out_of_the_folder_is_followed_only_on_request(copied: tuple[Path, Path]) -> None:
    folder, file = copied
    expected = set(open_checkpoint(folder).tensors)
    outside = folder.parent / "outside"
    file.rename(outside)
    file.symlink_to(outside)
    with pytest.raises(CheckpointError, match=rf"{file.name} is a link out of its folder, to .*outside: copy .* give --follow-links"):
        open_checkpoint(folder)
    assert set(open_checkpoint(folder, OpenOptions(follow_links=True)).tensors) == expected


def test_a_link_within_the_folder_is_followed(copied: tuple[Path, Path]) -> None:
    folder, file = copied
    expected = set(open_checkpoint(folder).tensors)
    (folder / "data").mkdir()
    file.rename(folder / "data" / "content")
    file.symlink_to(folder / "data" / "content")
    assert set(open_checkpoint(folder).tensors) == expected
