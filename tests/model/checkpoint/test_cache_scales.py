"""Stored scales of an int8 cache lie in a file of their own, so that other programs find the weights alone; older folders still load."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from launcher.settings.hub_files import choose_files
from model.checkpoint import folder_writing
from model.checkpoint.cache_scales import CACHE_SCALES_FILE
from model.checkpoint.formats import open_checkpoint
from model.checkpoint.verification import require_intact
from model.decoder.loading import check_checkpoint
from model.export.conversion import convert_checkpoint
from model.export.rank_files import write_rank_files
from model.spec.config import build_config
from model.spec.scheme import Scheme, declare_scheme, read_scheme
from parallel.errors import CheckpointError
from parallel.file_slices import FileReader


@pytest.fixture
def old(tiny_llama: Callable[[str], Path], tmp_path: Path) -> Path:
    """A folder as earlier versions wrote it, with the scales among the weights."""
    source, folder = tiny_llama("nine_heads"), tmp_path / "old"
    folder.mkdir()
    config, tensors = json.loads((source / "config.json").read_text()), load_file(source / "model.safetensors")
    for layer in range(config["num_hidden_layers"]):
        for name in ("k_scale", "v_scale"):
            tensors[f"model.layers.{layer}.self_attn.{name}"] = torch.rand(config["num_key_value_heads"] * config["head_dim"])
    (folder / "config.json").write_text(json.dumps(declare_scheme(config, Scheme(kv_cache="channel"))))
    save_file(tensors, folder / "model.safetensors")
    return folder


def ignore_progress(*arguments: object) -> None:
    pass


def check(folder: Path) -> None:
    source = open_checkpoint(folder)
    scheme = read_scheme(source.config)
    assert scheme.kv_cache == "channel"
    check_checkpoint(source, build_config(source.config), scheme)


@pytest.mark.parametrize("max_bytes", [5_000_000_000, 100_000], ids=["one file", "several"])
def test_scales_are_written_to_a_file_that_others_do_not_read(
    old: Path, tmp_path: Path, max_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(old)
    monkeypatch.setattr(folder_writing, "MAX_FILE_BYTES", max_bytes)
    new = tmp_path / "new"
    convert_checkpoint(open_checkpoint(old), new, None, ignore_progress)
    check(new)
    found = list(new.glob("*.safetensors"))
    assert (len(found) == 1) == (max_bytes > 1e9) == (not (new / "model.safetensors.index.json").exists())
    weights = {name: tensor for file in found for name, tensor in load_file(file).items()}
    scales = load_file(new / CACHE_SCALES_FILE)
    before = load_file(old / "model.safetensors")
    assert set(scales) == {name for name in before if name.endswith("_scale")} and not set(scales) & set(weights)
    for name, tensor in before.items():
        assert torch.equal((weights | scales)[name], tensor)
    assert "kv_cache_scheme" not in (json.loads((new / "config.json").read_text()).get("quantization_config") or {})
    require_intact(open_checkpoint(new), ignore_progress)
    assert CACHE_SCALES_FILE in choose_files("org/name", [file.name for file in new.iterdir()] + ["tokenizer.json"])


def test_rank_files_of_both_are_the_same(old: Path, tmp_path: Path) -> None:
    convert_checkpoint(open_checkpoint(old), tmp_path / "new", None, ignore_progress)
    read = []
    for name in ("old", "new"):
        source = open_checkpoint(tmp_path / name)
        write_rank_files(source, build_config(source.config), read_scheme(source.config), 3, tmp_path / f"{name}-ranks")
        source, reader = open_checkpoint(tmp_path / f"{name}-ranks"), FileReader()
        read.append({one: source.read_rows(reader, one, 0, info.shape[0]) for one, info in source.tensors.items()})
    assert set(read[0]) == set(read[1]) and all(torch.equal(read[0][name], read[1][name]) for name in read[0])


def test_a_damaged_or_missing_file_is_refused(old: Path, tmp_path: Path) -> None:
    new = tmp_path / "new"
    convert_checkpoint(open_checkpoint(old), new, None, ignore_progress)
    file = new / CACHE_SCALES_FILE
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=CACHE_SCALES_FILE):
        require_intact(open_checkpoint(new), ignore_progress)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"4 missing: model.layers.0.self_attn.k_scale"):
        check(new)
