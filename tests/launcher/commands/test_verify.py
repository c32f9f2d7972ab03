"""`tandem verify` of a `.ckpt` without a YAML: what needs no config is checked, and what it finds is said."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher.commands.verify import verify
from launcher.settings.checkpoint_options import VerifyOptions
from parallel.errors import CheckpointError
from tests.model.mindspore_files import CONFIG, add_difference, cut, fuse, interleave, make_float, make_rtn, write_ckpt

Check = Callable[..., dict[str, Any]]
LAYER = "model.layers.1"


@pytest.fixture
def check(capsys: pytest.CaptureFixture[str]) -> Check:
    """What verify prints as JSON; problems have to end in an error."""

    def run(path: Path, *, deep: bool = False) -> dict[str, Any]:
        capsys.readouterr()
        failed = False
        try:
            verify(VerifyOptions(checkpoint=path, deep=deep, as_json=True))
        except CheckpointError:
            failed = True
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        assert found["ok"] == (not failed) == (not found["problems"])
        return found

    return run


@pytest.mark.parametrize("make", [make_float, make_rtn])
def test_a_whole_file_is_ok(tmp_path: Path, check: Check, make: Callable[[], dict[str, torch.Tensor]]) -> None:
    tensors = make()
    found = check(write_ckpt(tmp_path / "x.ckpt", tensors, crc=True), deep=True)
    assert found["ok"]
    assert (found["format"], found["config"], found["fused_order"], found["num_tensors"]) == ("mindspore", None, None, len(tensors))
    assert [file["recorded_in"] for file in found["files"]] == ["the file's own CRC"]
    assert {one["name"]: tuple(one["shape"]) for one in found["tensors"]} == {name: tuple(one.shape) for name, one in tensors.items()}
    assert "shapes were not compared with a model's" in found["notes"][0]


def test_ranks_are_checked_together(tmp_path: Path, check: Check) -> None:
    parts = cut(make_float(), 2)
    for rank, part in enumerate(parts):
        write_ckpt(tmp_path / "ranks" / f"rank_{rank}" / "x.ckpt", part)
    found = check(tmp_path / "ranks")
    assert found["ok"]
    assert found["num_tensors"] == 2 * len(parts[0])
    assert found["tensors"][0]["name"].startswith("rank_0/x.ckpt: model.")
    one = check(tmp_path / "ranks" / "rank_1" / "x.ckpt")
    assert "is one of them, but each tensor was cut into 2 slices" in one["problems"][0]
    del parts[1]["model.layers.0.attention.wq.weight"]
    write_ckpt(tmp_path / "ranks" / "rank_1" / "x.ckpt", parts[1])
    problem = check(tmp_path / "ranks")["problems"][0]
    assert re.search(r"rank_0/x\.ckpt holds model\.layers\.0\.attention\.wq\.weight.*rank_1/x\.ckpt does not, and no other file", problem)


@pytest.mark.parametrize(
    ("left_out", "problem"),
    [
        ("model.norm_out.weight", "model.norm_out.weight is missing"),
        (f"{LAYER}.attention.wk._handler.weight", "layer 1: attention.wk has only weight_scale, weight_zero, which is no whole linear"),
        (f"{LAYER}.ffn_norm.weight", "layer 1 has no ffn_norm.weight, which other layers have"),
    ],
)
def test_names_that_are_missing(tmp_path: Path, check: Check, left_out: str, problem: str) -> None:
    tensors = make_rtn()
    del tensors[left_out]
    assert check(write_ckpt(tmp_path / "x.ckpt", tensors))["problems"] == [problem]


def test_layers_that_are_missing_and_names_that_no_llama_has(tmp_path: Path, check: Check) -> None:
    tensors = {name: tensor for name, tensor in make_float().items() if "layers.0" not in name}
    tensors["model.layers.1.attention.wq.bias_of_another"] = torch.ones(3)
    problems = check(write_ckpt(tmp_path / "x.ckpt", tensors))["problems"]
    assert "layer 0 is missing" in problems
    assert "model.layers.1.attention.wq.bias_of_another: not a tensor of MindFormers' Llama" in problems
    assert check(write_ckpt(tmp_path / "y.ckpt", {"a": torch.ones(2, 2)}))["problems"] == [
        "no tensor of a layer of MindFormers' Llama (model.layers.N.)",
        "a: not a tensor of MindFormers' Llama",
    ]


def test_damage_is_found(tmp_path: Path, check: Check) -> None:
    file = write_ckpt(tmp_path / "x.ckpt", make_float(), crc=True)
    whole = file.read_bytes()
    file.write_bytes(whole[:-2000])
    assert "copy it again" in check(file)["problems"][0]
    file.write_bytes(whole[: len(whole) // 2] + bytes([whole[len(whole) // 2] ^ 1]) + whole[len(whole) // 2 + 1 :])
    assert "x.ckpt is damaged: its checksum is" in check(file)["problems"][0]
    tensors = make_float()
    tensors["lm_head.weight"][3, 4] = float("nan")
    write_ckpt(file, tensors)
    assert check(file)["ok"]
    assert check(file, deep=True)["problems"] == ["lm_head.weight holds 1 NaN and 0 infinite values"]


@pytest.mark.parametrize("order", ["1.3", "1.4", None])
def test_the_order_of_fused_weights_is_reported(
    tmp_path: Path, check: Check, capsys: pytest.CaptureFixture[str], order: str | None
) -> None:
    tensors = fuse(add_difference(make_float()) if order else make_float())
    file = write_ckpt(tmp_path / "x.ckpt", interleave(tensors, 4, 2) if order == "1.4" else tensors)
    found = check(file, deep=True)
    assert found["ok"]
    assert found["fused_order"] == order
    words = f"in MindFormers {order}'s row order (order 1.3 explains" if order else "in an unknown row order: see --fused-order"
    assert words in found["notes"][1]
    capsys.readouterr()
    verify(VerifyOptions(checkpoint=file, deep=True, as_json=False))
    assert f"note: the fused weights are {words}" in capsys.readouterr().out
    # With a config, shapes are compared, too, and an order that cannot be told is a problem.
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    found = check(file)
    assert found["ok"] == (order is not None)
    assert found.get("fused_order") == order
    assert order is not None or "row order cannot be told" in found["problems"][0]
