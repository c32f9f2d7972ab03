"""AutoRound folders: GPTQ's and AWQ's tensors under AutoRound's settings, with other settings for single linears."""

from pathlib import Path
from typing import Any

import pytest
import torch

from model.checkpoint.auto_round_folder import is_auto_round, open_auto_round
from model.checkpoint.column_packed import ColumnPackedFolder
from model.checkpoint.formats import find_format, open_checkpoint
from model.checkpoint.notes import list_notes
from model.spec.config import build_config
from model.spec.scheme import read_scheme
from parallel.errors import ConfigError
from tests.model.checkpoint.test_gptq_awq import GATE, awq, dequantize, gptq, write

SETTINGS: dict[str, Any] = {
    "quant_method": "auto-round",
    "packing_format": "auto_round:auto_gptq",
    "bits": 4,
    "group_size": 32,
    "sym": True,
    "data_type": "int",
    "autoround_version": "0.8.0",
    "act_bits": 16,
    "iters": 200,
    "block_name_to_quantize": "model.layers",
}


def check(path: Path, truth: dict[str, torch.Tensor]) -> ColumnPackedFolder:
    """Compare every linear with the truth, as far as it is in the folder."""
    source = open_checkpoint(path)
    assert isinstance(source, ColumnPackedFolder)
    scheme = read_scheme(source.config)
    for name, expected in truth.items():
        assert torch.equal(dequantize(source, scheme, name), expected), name
    return source


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("packing", ["auto_round:auto_gptq", "auto_round:gptq"])
def test_gptq_tensors_are_read_with_zero_points_less_one(tmp_path: Path, packing: str, sym: bool) -> None:
    tensors, _, truth = gptq(4, 32, sym=sym)
    write(tmp_path / "m", tensors, SETTINGS | {"packing_format": packing, "sym": sym})
    assert find_format(tmp_path / "m") == "auto-round"
    source = check(tmp_path / "m", truth)
    assert list_notes(source, build_config(source.config)) == []


def test_older_folders_name_the_packing_as_backend(tmp_path: Path) -> None:
    tensors, _, truth = gptq(4, 32, sym=True)
    old = {key: value for key, value in SETTINGS.items() if key != "packing_format"}
    write(tmp_path / "m", tensors, old | {"quant_method": "intel/auto-round", "backend": "auto_round:gptq:exllamav2"})
    check(tmp_path / "m", truth)


def test_awq_tensors_are_read(tmp_path: Path) -> None:
    tensors, _, truth = awq(32)
    write(tmp_path / "m", tensors, SETTINGS | {"packing_format": "auto_round:auto_awq", "sym": False})
    check(tmp_path / "m", truth)


@pytest.mark.parametrize("name", [GATE, r".*layers\.1\.mlp\.gate_proj"])
def test_a_linear_has_the_settings_of_its_entry(tmp_path: Path, name: str) -> None:
    (tensors, _, truth), (wide, _, others) = gptq(4, 32, sym=True), gptq(8, 64, sym=True)
    tensors |= {key: value for key, value in wide.items() if key.startswith(GATE)}
    write(tmp_path / "m", tensors, SETTINGS | {"extra_config": {name: {"bits": 8, "group_size": 64}}})
    check(tmp_path / "m", truth | {GATE: others[GATE]})


def test_a_linear_of_16_bits_is_float(tmp_path: Path) -> None:
    tensors, _, truth = gptq(4, 32, sym=True)
    tensors = {key: value for key, value in tensors.items() if not key.startswith(GATE)}
    tensors[f"{GATE}.weight"] = truth.pop(GATE).half().contiguous()
    write(tmp_path / "m", tensors, SETTINGS | {"extra_config": {GATE: {"bits": 16, "data_type": "float"}}})
    source = check(tmp_path / "m", truth)
    assert not read_scheme(source.config).is_quantized(GATE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"packing_format": "auto_round"}, r"packing_format 'auto_round' of AutoRound is not supported; there are auto_round:auto_gptq"),
        ({"packing_format": "auto_round:llm_compressor"}, "packing_format 'auto_round:llm_compressor'"),
        ({"packing_format": None}, "packing_format None of AutoRound"),
        ({"bits": 3}, "weights of 3 bits are not supported; there are 4 and 8"),
        ({"bits": 2}, "weights of 2 bits are not supported; there are 4 and 8"),
        ({"packing_format": "auto_round:auto_awq", "bits": 8}, "weights of 8 bits are not supported; there is 4"),
        ({"data_type": "mx_fp4"}, "data_type 'mx_fp4' of AutoRound is not supported"),
        ({"act_bits": 8}, "act_bits is 8, but only 16 or 32"),
        ({"super_bits": 6}, "super_bits is 6, but only null"),
        ({"extra_config": [1]}, r"extra_config is \[1\], but an object"),
        ({"extra_config": {"x": 4}}, "extra_config gives 'x' 4, but an object"),
        ({"extra_config": {"x": {"bits": 2}}}, "weights of 2 bits"),
        ({"extra_config": {"x": {"rotate": 1}}}, "extra_config changes 'rotate' for 'x', which is not supported"),
        ({"extra_config": {"(a+)+": {"bits": 8}}}, "the pattern .* in extra_config is not supported"),
        ({"sym": "yes"}, "sym is 'yes', but true or false"),
        ({"group_size": 0}, "group_size is 0, but"),
    ],
)
def test_settings_that_are_not_supported_are_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    tensors, _, _ = gptq(4, 32, sym=True)
    write(tmp_path / "m", tensors, SETTINGS | changes)
    assert is_auto_round(tmp_path / "m")
    with pytest.raises(ConfigError, match=message):
        open_auto_round(tmp_path / "m")
