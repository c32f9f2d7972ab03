"""A split GGUF file of K-quants through the commands: the tokens of its dequantized form, the planned bytes, and int8 in one step."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import load_file

from model.checkpoint.formats import open_checkpoint
from model.spec.scheme import read_scheme
from tests.model.gguf_blocks import write_blocks

if TYPE_CHECKING:
    from tests.end_to_end.conftest import Tandem


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first of two parts."""
    folder = tmp_path_factory.mktemp("split")
    return write_blocks(folder / "m.gguf", lambda name: Kind.Q6_K if "output" in name else Kind.Q4_K, part_tensors=12, vocabulary=True)


def test_three_ranks_read_the_planned_bytes_and_decode_the_tokens_of_the_converted_file(tandem: "Tandem", split: Path) -> None:
    folder, options = tandem.new_folder(), ("--dtype", "float32", "--prompt", "abc", "--max-new-tokens", "12", "--ignore-eos")
    three = tandem.predict("--checkpoint", split, "--workers", "3", *options)
    converted = tandem.run("convert", split, folder / "hf")
    assert converted.returncode == 0, converted.stderr
    one = tandem.predict("--checkpoint", folder / "hf", "--workers", "1", *options)
    assert three.records[0]["token_ids"] == one.records[0]["token_ids"]
    planned = tandem.run("plan", "--checkpoint", split, "--workers", "3", "--dtype", "float32", "--json")
    plan = json.loads(planned.stdout)
    assert three.stats["read_bytes"] == [rank["file_bytes"] for rank in plan["ranks"]]
    assert three.stats["weight_bytes"] == [rank["weight_bytes"] for rank in plan["ranks"]]
    assert plan["encodings"] == ["Q4_K", "Q6_K"] and three.stats["quantization"] == "none"


def test_convert_quantizes_in_one_step(tandem: "Tandem", split: Path) -> None:
    folder = tandem.new_folder()
    for source, target, words in (
        (split, "one", ("--quantize", "rtn-a16w8")),
        (split, "float", ()),
        (split, "half", ("--quantize", "rtn-a16w8", "--dtype", "bfloat16")),
    ):
        result = tandem.run("convert", source, folder / target, *words, cwd=folder)
        assert result.returncode == 0, result.stderr
    result = tandem.run("quantize", folder / "float", "-a", "rtn-a16w8", "--output", folder / "two", "--workers", "2", cwd=folder)
    assert result.returncode == 0, result.stderr
    one, two, half = (load_file(folder / name / "model.safetensors") for name in ("one", "two", "half"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert read_scheme(open_checkpoint(folder / "one").config).name == "rtn-a16w8"
    assert half["model.norm.weight"].dtype == torch.bfloat16
    assert all(torch.equal(one[name], half[name]) for name in one if name.endswith("packed"))


def test_quantizing_into_a_ckpt_is_refused(tandem: "Tandem", split: Path, tmp_path: Path) -> None:
    result = tandem.run("convert", split, tmp_path / "m.ckpt", "--to", "mindspore", "--quantize", "rtn-a16w8")
    assert (result.returncode, result.stdout) == (2, "")
    assert "--quantize writes a Hugging Face folder: drop --to mindspore" in result.stderr and not list(tmp_path.iterdir())
