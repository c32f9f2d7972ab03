"""The fingerprint of a checkpoint: equal for copies and for formats with the same tensors, other for other weights or settings."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.checkpoint.fingerprint import CheckpointReplacedError, Fingerprint, check_unchanged, read_fingerprint, read_state
from model.checkpoint.formats import open_checkpoint
from model.export.mindspore import write_mindspore
from model.export.rank_files import write_rank_files
from model.spec.config import build_config
from model.spec.scheme import read_scheme

CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 32,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "float32",
}


def fingerprint(path: Path) -> Fingerprint:
    source = open_checkpoint(path)
    return read_fingerprint(source, build_config(source.config), read_scheme(source.config))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny float checkpoint."""
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIG))
    shapes = {"model.embed_tokens.weight": (32, 64), "model.norm.weight": (64,), "lm_head.weight": (32, 64)}
    for layer in range(2):
        name = f"model.layers.{layer}"
        shapes |= {f"{name}.{norm}.weight": (64,) for norm in ("input_layernorm", "post_attention_layernorm")}
        shapes |= {f"{name}.self_attn.{one}_proj.weight": (64 if one in "qo" else 32, 64) for one in "qkvo"}
        shapes |= {f"{name}.mlp.{one}_proj.weight": (96, 64) for one in ("gate", "up")} | {f"{name}.mlp.down_proj.weight": (64, 96)}
    generator = torch.Generator().manual_seed(0)
    save_file({name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}, path / "model.safetensors")
    return path


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change tensors in place; size and modification time stay."""
    file = folder / "model.safetensors"
    stat, tensors = file.stat(), load_file(file)
    change(tensors)
    save_file(tensors, file)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_a_copy_has_the_same_content_and_so_have_rank_files(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    before, copy = fingerprint(folder), fingerprint(tmp_path / "copy")
    assert before.content == copy.content and before.files.keys() != copy.files.keys()
    source = open_checkpoint(folder)
    write_rank_files(source, build_config(source.config), read_scheme(source.config), 2, tmp_path / "ranks")
    assert fingerprint(tmp_path / "ranks").content == before.content


@pytest.mark.parametrize("row", [0, 48, 95])
@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.gate_proj.weight"])
def test_a_change_in_a_sampled_row_of_any_tensor_is_seen_though_size_and_time_are_the_same(folder: Path, name: str, row: int) -> None:
    before = fingerprint(folder)
    rewrite(folder, lambda tensors: tensors[name][row].add_(1))
    now = fingerprint(folder)
    assert now.files == before.files and now.content != before.content
    with pytest.raises(CheckpointReplacedError, match=rf"weights differ.*was {before.content} at the start and is {now.content} now"):
        check_unchanged(before, lambda: now)


def test_other_weights_of_the_same_shapes_differ_in_a_format_that_converts(folder: Path, tmp_path: Path) -> None:
    found = []
    for number in range(2):
        source, target = open_checkpoint(folder), tmp_path / f"{number}.ckpt"
        write_mindspore(source, build_config(source.config), read_scheme(source.config), target, None, lambda done, total: None)
        shutil.copy(folder / "config.json", tmp_path)
        found.append(fingerprint(target))
        rewrite(folder, lambda tensors: [tensor.mul_(1.001) for tensor in tensors.values()])
    assert found[0].content != found[1].content


def test_a_replaced_file_a_gone_file_and_another_config_are_named(folder: Path) -> None:
    file, config = folder / "model.safetensors", folder / "config.json"
    source = open_checkpoint(folder)
    before = read_state(source)
    check_unchanged(before, lambda: read_state(open_checkpoint(folder)))
    copy = folder / "new"
    shutil.copy(file, copy)
    copy.rename(file)  # as a download replaces it: the content is the same, its time is not
    with pytest.raises(CheckpointReplacedError, match=rf"{file} has {file.stat().st_size} bytes, modified .*: its fingerprint was"):
        check_unchanged(before, lambda: read_state(source))
    before = read_state(source)
    config.write_text(json.dumps({**CONFIG, "rope_theta": 1e6}))
    with pytest.raises(CheckpointReplacedError, match="its config has other values"):
        check_unchanged(before, lambda: read_state(open_checkpoint(folder)))
    now = read_state(open_checkpoint(folder))
    with pytest.raises(CheckpointReplacedError, match=f"{folder / 'more'} is gone"):
        check_unchanged(replace(now, files={**now.files, str(folder / "more"): (1, 1)}), lambda: now)
    file.unlink()
    with pytest.raises(CheckpointReplacedError, match="can no longer be opened"):
        check_unchanged(before, lambda: read_state(open_checkpoint(folder)))


def test_settings_belong_to_the_content(folder: Path) -> None:
    before = fingerprint(folder)
    (folder / "config.json").write_text(json.dumps({**CONFIG, "rms_norm_eps": 1e-6}))
    assert fingerprint(folder).content != before.content
