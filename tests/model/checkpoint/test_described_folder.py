"""Folders of Golden Stick 1.4 and ModelSlim, written here in every form, and the real ones among the shared data."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.checkpoint.described_folder import DescribedFolder
from model.checkpoint.formats import find_format, open_checkpoint
from model.spec.config import build_config
from model.spec.linear_scheme import LinearScheme
from model.spec.scheme import read_scheme
from model.spec.weights import compare_tensors, linear_names, linear_shape, plan_weights
from parallel.errors import CheckpointError
from parallel.file_slices import FileReader

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 40,
    "quantize": "w8a16",
}
FORMS = {
    "W8A16": LinearScheme(packed=False),
    "W8A8_DYNAMIC": LinearScheme(packed=False, activation="token"),
    "W8A8": LinearScheme(packed=False, activation="tensor", activation_symmetric=False),
}


def make(form: str, *, wide_scales: bool = False) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    config = build_config(CONFIG)
    tensors = {"model.embed_tokens.weight": torch.randn(40, 32), "model.norm.weight": torch.rand(32), "lm_head.weight": torch.randn(40, 32)}
    for layer in range(2):
        tensors |= {f"model.layers.{layer}.{name}.weight": torch.rand(32) for name in ("input_layernorm", "post_attention_layernorm")}
    for name in linear_names(config):
        rows, columns = linear_shape(config, name.partition("layers.")[2].partition(".")[2])
        weight, scale = torch.randint(-128, 128, (rows, columns), dtype=torch.int8), torch.rand(rows, 1) * 0.01 + 0.001
        tensors[f"{name}.weight"] = weight
        if form != "W8A8":
            tensors |= {f"{name}.weight_scale": scale, f"{name}.weight_offset": torch.zeros(rows, 1)}
            continue
        input_scale, offset = torch.tensor([0.03125]), torch.tensor([-9.0])
        deq = (scale * input_scale).flatten()
        tensors |= {
            f"{name}.input_scale": input_scale,
            f"{name}.input_offset": offset,
            f"{name}.deq_scale": deq.view(torch.int32).to(torch.int64) & 0xFFFFFFFF if wide_scales else deq,
            f"{name}.quant_bias": (9 * weight.sum(1, dtype=torch.int64)).to(torch.int32),
        }
    return tensors


def write(folder: Path, tensors: dict[str, torch.Tensor], form: str, *, files: int = 1, index: bool = False, **changes: str) -> Path:
    folder.mkdir()
    names = sorted(tensors)
    parts = [names[number::files] for number in range(files)]
    weight_map = {}
    for number, part in enumerate(parts):
        file = f"quant-model-{number + 1:05}-of-{files:05}.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "ms"})
        weight_map |= dict.fromkeys(part, file)
    if index:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    described = {name: form if "proj." in name else "FLOAT" for name in names} | changes
    name = "quantization_description.json" if index else f"quant_model_description_{form.lower()}.json"
    (folder / name).write_text(json.dumps({"model_quant_type": form, "version": "1.0.0"} | described))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def read(source: DescribedFolder, name: str) -> torch.Tensor:
    reader = FileReader()
    rows = source.tensors[name].shape[0]
    whole = source.read_rows(reader, name, 0, rows)
    assert torch.equal(source.read_rows(reader, name, rows // 3, rows), whole[rows // 3 :])
    located = source.locate_rows(name, 0, rows)
    assert not located or torch.equal(reader.read_rows(located, 0, rows), whole)
    reader.close()
    return whole


@pytest.mark.parametrize("equal", [True, False])
def test_a_head_that_differs_from_a_tied_embedding_is_not_tied(tmp_path: Path, equal: bool) -> None:
    tensors = make("W8A16")
    if equal:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    folder = write(tmp_path / "model", tensors, "W8A16")
    (folder / "config.json").write_text(json.dumps(CONFIG | {"tie_word_embeddings": True}))
    source = DescribedFolder(folder)
    assert build_config(source.config).tie_word_embeddings is equal
    assert (source.notes == ()) is equal


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("files", "index"), [(1, False), (3, False), (2, True)])
def test_every_form_is_read(tmp_path: Path, form: str, files: int, index: bool) -> None:
    tensors = make(form, wide_scales=index)
    folder = write(tmp_path / "model", tensors, form, files=files, index=index)
    assert find_format(folder) == "modelslim"
    source = open_checkpoint(folder)
    assert isinstance(source, DescribedFolder)
    config, scheme = build_config(source.config), read_scheme(source.config)
    assert (scheme.linear, scheme.ignore) == (FORMS[form], ("lm_head",))
    assert compare_tensors(plan_weights(config, scheme), source.tensors, tied=False).describe() == ""
    for name in (*linear_names(config), "lm_head", "model.embed_tokens", "model.layers.1.input_layernorm"):
        assert torch.equal(read(source, f"{name}.weight"), tensors[f"{name}.weight"])
    torch.manual_seed(1)
    for name in linear_names(config):
        weight, scale = tensors[f"{name}.weight"].double(), read(source, f"{name}.weight_scale").double()
        if form != "W8A8":
            assert torch.equal(scale.float(), tensors[f"{name}.weight_scale"])
            continue
        # ModelSlim multiplies the rounded input as it is, adds the bias, then multiplies by deq_scale.
        given, offset = tensors[f"{name}.input_scale"], int(tensors[f"{name}.input_offset"])
        rounded = torch.round(torch.randn(5, weight.shape[1]) / given + offset).clamp(-128, 127).double()
        deq = (0.03125 * scale.float()).flatten().double()
        expected = (rounded @ weight.T + tensors[f"{name}.quant_bias"]) * deq
        zero, divisor = int(read(source, f"{name}.input_zero_point")), read(source, f"{name}.input_scale").double()
        assert (zero, float(divisor)) == (-9, 0.03125)
        torch.testing.assert_close((rounded - zero) * divisor @ (weight * scale).T, expected, rtol=1e-12, atol=1e-9)


NAME = "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize(
    ("form", "changes", "described", "message"),
    [
        ("W8A16", {"weight_offset": torch.eye(48)[0]}, {}, r"1 of 48 values of .*up_proj\.weight_offset are not 0, but only symmetric"),
        ("W8A16", {"weight_scale": torch.rand(48, 2)}, {}, r"weight_scale has the shape \[48, 2\], but one value for each of 48 rows"),
        ("W8A16", {"weight_scale": None}, {}, r"describes .*up_proj as W8A16, but holds no .*up_proj\.weight_scale"),
        ("W8A16", {"weight": torch.rand(48, 32)}, {}, r"up_proj\.weight is float32 \[48, 32\], but int8 \[rows, columns\] is needed"),
        ("W8A16", {}, {f"{NAME}.weight": "W4A8_DYNAMIC"}, "stores .*up_proj as 'W4A8_DYNAMIC', but only FLOAT, W8A16, W8A8_DYNAMIC, W8A8"),
        ("W8A8", {"quant_bias": torch.zeros(48, dtype=torch.int32)}, {}, "quant_bias is 0 in row 0, but its input_offset gives"),
        ("W8A8", {"input_offset": torch.tensor([0.5])}, {}, "input_offset is 0.5 and input_scale 0.03125, but a whole number"),
        ("W8A8", {"input_scale": torch.rand(32)}, {}, "input_scale has 32 values, but one for all channels"),
    ],
)
def test_what_is_not_understood_is_refused(
    tmp_path: Path, form: str, changes: dict[str, torch.Tensor | None], described: dict[str, str], message: str
) -> None:
    tensors = make(form)
    for part, tensor in changes.items():
        if tensor is None:
            del tensors[f"{NAME}.{part}"]
        else:
            tensors[f"{NAME}.{part}"] = tensor
    with pytest.raises(CheckpointError, match=message):
        DescribedFolder(write(tmp_path / "model", tensors, form, **described))


def test_linears_of_several_forms_are_read_as_each_is_stored(tmp_path: Path) -> None:
    """ModelSlim mixes static and dynamic int8 activations."""
    tensors = {**make("W8A8"), **{name: tensor for name, tensor in make("W8A8_DYNAMIC").items() if ".mlp." in name}}
    tensors = {name: tensor for name, tensor in tensors.items() if ".mlp." not in name or not name.endswith(("input_scale", "deq_scale"))}
    tensors = {name: tensor for name, tensor in tensors.items() if ".mlp." not in name or not name.endswith(("input_offset", "quant_bias"))}
    described = {name: "W8A8_DYNAMIC" for name in tensors if ".mlp." in name}
    source = DescribedFolder(write(tmp_path / "model", tensors, "W8A8", **described))
    scheme, config = read_scheme(source.config), build_config(source.config)
    assert scheme.name == "a8w8-static+a8w8-dynamic"
    for name in linear_names(config):
        assert scheme.find_linear(name) == FORMS["W8A8_DYNAMIC" if ".mlp." in name else "W8A8"]
    assert compare_tensors(plan_weights(config, scheme), source.tensors, tied=False).describe() == ""


@pytest.mark.parametrize("index", [False, True])
def test_files_of_the_original_are_left_out(tmp_path: Path, index: bool) -> None:
    """ModelSlim's output may be written into the folder of the original, whose index may be copied without its files."""
    tensors = make("W8A16")
    expected = DescribedFolder(write(tmp_path / "alone", tensors, "W8A16")).tensors
    folder = write(tmp_path / "model", tensors, "W8A16", files=2, index=index)
    if index:
        (folder / "model.safetensors.index.json").rename(folder / "quant_model_weights.safetensors.index.json")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": "model-1.safetensors"}}))
    assert DescribedFolder(folder).tensors == expected
    save_file({"lm_head.weight": torch.zeros(40, 32)}, folder / "model-1.safetensors")
    source = DescribedFolder(folder)
    assert source.tensors == expected
    assert torch.equal(read(source, "lm_head.weight"), tensors["lm_head.weight"])


def test_folders_that_are_not_whole_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "model", make("W8A16"), "W8A16", files=2, index=True)
    description = folder / "quantization_description.json"
    described = json.loads(description.read_text())
    description.write_text(json.dumps({name: form for name, form in described.items() if name != f"{NAME}.weight"}))
    with pytest.raises(CheckpointError, match=r"does not say how model\.layers\.1\.mlp\.up_proj\.weight is stored"):
        DescribedFolder(folder)
    description.write_text("[1")
    with pytest.raises(CheckpointError, match="does not hold the form of each tensor"):
        DescribedFolder(folder)
    description.write_text(json.dumps(described))
    (folder / "quant-model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="lacks 1 of its 2 files"):
        DescribedFolder(folder)


@pytest.mark.parametrize("name", ["L20-golden-stick-1.4-safetensors", "L21-msmodelslim-w8a16"])
def test_real_folders(shared_dir: Path, name: str) -> None:
    folder = shared_dir / "cases" / "mindformers" / name
    if not folder.is_dir():
        pytest.skip(f"no cases/mindformers/{name} among the shared data")
    source = open_checkpoint(folder)
    assert isinstance(source, DescribedFolder)
    config, scheme = build_config(source.config), read_scheme(source.config)
    assert scheme.name == "rtn-a16w8"
    assert compare_tensors(plan_weights(config, scheme), source.tensors, tied=config.tie_word_embeddings).describe() == ""
    truth = load_file(shared_dir / "data" / "stories260K-hf" / "model.safetensors")
    for linear in linear_names(config):
        weight, scale = read(source, f"{linear}.weight"), read(source, f"{linear}.weight_scale")
        error = (weight * scale - truth[f"{linear}.weight"]).abs()
        # Half a step, and the largest of a row, which is cut off at 127.
        assert bool((error <= 0.51 * scale + 1e-6).all())
    assert torch.equal(read(source, "model.embed_tokens.weight"), truth["model.embed_tokens.weight"])
