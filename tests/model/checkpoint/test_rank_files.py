"""Rank files: what is written for any number of ranks is the checkpoint again, and what does not fit is named."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.checkpoint.completeness import check_checkpoint
from model.checkpoint.formats import open_checkpoint
from model.checkpoint.hf_folder import HuggingFaceFolder
from model.checkpoint.rank_files import LAYOUT_FILE, RankFiles, rank_file_name
from model.export.rank_files import write_rank_files
from model.spec.config import build_config
from model.spec.scheme import Scheme, read_scheme
from parallel.errors import CheckpointError, ConfigError, LayoutError

K_PROJ = "model.layers.0.self_attn.k_proj.weight"
NORM = "model.norm.weight"


def reshard(source: Path, world_size: int, target: Path, **options: Any) -> int:
    opened = open_checkpoint(source)
    return write_rank_files(opened, build_config(opened.config), read_scheme(opened.config), world_size, target, **options)


@pytest.fixture(params=["nine_heads", "tied", "int8"])
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path, tiny_llama: Callable[[str], Path], quantize: Callable[..., Scheme]) -> Path:
    """A Hugging Face folder: float, tied, and int8."""
    if request.param != "int8":
        return tiny_llama(request.param)
    quantize(tiny_llama("nine_heads"), tmp_path / "int8", "lm_head")
    return tmp_path / "int8"


@pytest.mark.parametrize(("first", "second"), [(2, 3), (8, 2), (3, 8)])
def test_resharding_back_and_forth_gives_the_same_tensors(checkpoint: Path, first: int, second: int, tmp_path: Path) -> None:
    reshard(checkpoint, first, tmp_path / "first")
    reshard(tmp_path / "first", second, tmp_path / "second")
    reshard(tmp_path / "second", 1, tmp_path / "one")
    expected, found = load_file(checkpoint / "model.safetensors"), load_file(tmp_path / "one" / "model.safetensors")
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    assert json.loads((tmp_path / "one" / "config.json").read_text()) == json.loads((checkpoint / "config.json").read_text())
    HuggingFaceFolder(tmp_path / "one")


def test_a_rank_file_holds_the_rows_of_its_rank_and_the_layout_says_which(checkpoint: Path, tmp_path: Path) -> None:
    reshard(checkpoint, 3, tmp_path / "three")
    whole = load_file(checkpoint / "model.safetensors")
    layout = json.loads((tmp_path / "three" / LAYOUT_FILE).read_text())
    assert (layout["format_version"], layout["world_size"]) == (2, 3)
    assert list(layout["files"]) == [rank_file_name(rank, 3) for rank in range(3)]
    for rank, (file, sha256) in enumerate(layout["files"].items()):
        assert hashlib.sha256((tmp_path / "three" / file).read_bytes()).hexdigest() == sha256
        held = load_file(tmp_path / "three" / file)
        assert set(held) == set(layout["tensors"])
        for name, tensor in held.items():
            start, stop = layout["tensors"][name]["rows"][rank]
            assert torch.equal(tensor, whole[name][start:stop]), name


def test_reading_for_rank_files_takes_each_row_as_often_as_it_is_written(tmp_path: Path, tiny_llama: Callable[[str], Path]) -> None:
    progress: list[tuple[int, int]] = []
    read_bytes = reshard(tiny_llama("nine_heads"), 3, tmp_path / "three", on_progress=lambda done, total: progress.append((done, total)))
    written = sum(tensor.nbytes for rank in range(3) for tensor in load_file(tmp_path / "three" / rank_file_name(rank, 3)).values())
    assert read_bytes == written
    assert progress[-1] == (written, written) and progress == sorted(progress)


def test_tokenizer_files_come_along(tmp_path: Path, tiny_llama: Callable[[str], Path]) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny_llama("tied"), source)
    (source / "tokenizer.model").write_bytes(b"words")
    (source / "notes.txt").write_text("not this")
    reshard(source, 2, tmp_path / "two")
    assert (tmp_path / "two" / "tokenizer.model").read_bytes() == b"words"
    assert not (tmp_path / "two" / "notes.txt").exists()


def test_too_many_ranks_are_refused_and_nothing_is_written(tmp_path: Path, tiny_llama: Callable[[str], Path]) -> None:
    with pytest.raises(LayoutError, match="9 ranks are too many: the model has 8 query heads; 1 to 8 all work"):
        reshard(tiny_llama("tied"), 9, tmp_path / "nine")
    assert list(tmp_path.iterdir()) == []


def test_a_failure_on_the_way_leaves_nothing_behind(tmp_path: Path, tiny_llama: Callable[[str], Path]) -> None:
    def fail(done: int, total: int) -> None:
        if done > total / 2:
            raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        reshard(tiny_llama("tied"), 2, tmp_path / "two", on_progress=fail)
    assert list(tmp_path.iterdir()) == []


def test_a_failure_leaves_an_earlier_folder_as_it_was(tmp_path: Path, tiny_llama: Callable[[str], Path]) -> None:
    reshard(tiny_llama("tied"), 2, tmp_path / "two")
    before = {path.name: path.read_bytes() for path in (tmp_path / "two").iterdir()}

    def fail(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reshard(tiny_llama("tied"), 2, tmp_path / "two", on_progress=fail)
    assert {path.name: path.read_bytes() for path in (tmp_path / "two").iterdir()} == before
    reshard(tiny_llama("tied"), 4, tmp_path / "two")
    assert RankFiles(tmp_path / "two").world_size == 4
    assert [path.name for path in tmp_path.iterdir()] == ["two"]


@pytest.fixture
def two(tmp_path: Path, tiny_llama: Callable[[str], Path]) -> Path:
    """Rank files for two, to be broken."""
    reshard(tiny_llama("nine_heads"), 2, tmp_path / "two")
    return tmp_path / "two"


def change_layout(folder: Path, **changes: Any) -> None:
    layout = json.loads((folder / LAYOUT_FILE).read_text())
    (folder / LAYOUT_FILE).write_text(json.dumps({**layout, **changes}))


def change_file(path: Path, **changes: torch.Tensor | None) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    tensors.update(changes)
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)


def test_a_rank_file_that_is_missing_or_short_is_named(two: Path) -> None:
    path = two / rank_file_name(1, 2)
    content = path.read_bytes()
    path.write_bytes(content[:-10])
    with pytest.raises(CheckpointError, match=rf"rank_01_of_02\.safetensors is truncated: it has {len(content) - 10} bytes"):
        open_checkpoint(two)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"rank_01_of_02\.safetensors does not exist"):
        open_checkpoint(two)


def test_a_tensor_that_a_rank_file_lacks_is_named(two: Path) -> None:
    change_file(two / rank_file_name(1, 2), **{K_PROJ: None})
    with pytest.raises(CheckpointError, match=rf"rank_01_of_02\.safetensors holds no such tensor under {K_PROJ}"):
        open_checkpoint(two)


def test_a_tensor_of_another_shape_is_named(two: Path) -> None:
    change_file(two / rank_file_name(0, 2), **{K_PROJ: torch.zeros(16, 144)})
    with pytest.raises(CheckpointError, match=rf"holds shape \[16, 144\] under {K_PROJ}, but layout\.json says \[32, 144\]"):
        open_checkpoint(two)


def test_a_layout_that_cannot_be_used_is_refused(two: Path) -> None:
    change_layout(two, format_version=1)
    with pytest.raises(CheckpointError, match="has format version 1, but this tandem reads 2"):
        open_checkpoint(two)
    change_layout(two, format_version=2, world_size=3)
    with pytest.raises(CheckpointError, match="files names 2 files, but 3 ranks have rank_00_of_03"):
        open_checkpoint(two)
    (two / LAYOUT_FILE).write_text("{")
    with pytest.raises(CheckpointError, match=r"layout\.json cannot be read"):
        open_checkpoint(two)
    (two / LAYOUT_FILE).write_text("[]")
    with pytest.raises(CheckpointError, match=r"layout\.json cannot be read"):
        open_checkpoint(two)


def test_rank_files_that_hold_a_tensor_in_two_types_are_refused(two: Path) -> None:
    held = load_file(two / rank_file_name(0, 2))
    change_file(two / rank_file_name(0, 2), **{K_PROJ: held[K_PROJ].half()})
    with pytest.raises(CheckpointError, match=K_PROJ):
        open_checkpoint(two)


@pytest.fixture
def broken(tmp_path: Path, tiny_llama: Callable[[str], Path]) -> Callable[..., Path]:
    """A function that copies a checkpoint with tensors changed (None: left out)."""

    def build(**changes: torch.Tensor | None) -> Path:
        shutil.copytree(tiny_llama("nine_heads"), tmp_path / "broken")
        change_file(tmp_path / "broken" / "model.safetensors", **changes)
        return tmp_path / "broken"

    return build


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({K_PROJ: None}, f"1 missing: {K_PROJ}"),
        ({NORM: None, K_PROJ: None}, f"2 missing: {K_PROJ}, {NORM}"),
        ({"model.extra": torch.zeros(2)}, r"1 unexpected: model\.extra"),
        ({K_PROJ: torch.zeros(47, 144)}, rf"1 mismatched: {K_PROJ} has shape \[47, 144\], the config needs \[48, 144\]"),
        ({NORM: torch.zeros(144, dtype=torch.int32)}, f"1 mismatched: {NORM} is int32, but float32 or bfloat16 or float16 is needed"),
        ({K_PROJ: None, "model.extra": torch.zeros(2)}, r"1 missing: .*; 1 unexpected: model\.extra"),
    ],
)
def test_a_checkpoint_that_does_not_fit_its_config_is_refused_by_name(
    broken: Callable[..., Path], changes: dict[str, torch.Tensor | None], words: str
) -> None:
    source = open_checkpoint(broken(**changes))
    with pytest.raises(CheckpointError, match=rf"broken does not fit its config: {words}"):
        check_checkpoint(source, build_config(source.config), Scheme())


def test_ten_names_are_listed_and_the_rest_counted(broken: Callable[..., Path]) -> None:
    source = open_checkpoint(broken(**{f"extra.{i:02}": torch.zeros(1) for i in range(13)}))
    with pytest.raises(CheckpointError, match=r"13 unexpected: extra\.00, .*, extra\.09, and 3 more$"):
        check_checkpoint(source, build_config(source.config), Scheme())


def test_rotary_frequencies_of_old_exports_are_passed_over(broken: Callable[..., Path]) -> None:
    source = open_checkpoint(broken(**{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)}))
    check_checkpoint(source, build_config(source.config), Scheme())


def test_a_path_that_is_no_checkpoint_is_refused_with_what_can_be_read(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="none does not exist"):
        open_checkpoint(tmp_path / "none")
    with pytest.raises(CheckpointError, match="is an empty folder"):
        open_checkpoint(tmp_path)
    (tmp_path / "notes.txt").write_text("nothing")
    with pytest.raises(
        CheckpointError, match=r"is no checkpoint that can be read\. Readable: rank files .*; Hugging Face folder .*; GGUF file"
    ):
        open_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"config\.json does not exist"):
        open_checkpoint(tmp_path)
