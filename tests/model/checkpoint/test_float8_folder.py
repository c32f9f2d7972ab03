"""FP8 checkpoints of several tools against the same weights dequantized by compressed-tensors or transformers, on several ranks."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from model.checkpoint.completeness import check_checkpoint
from model.checkpoint.formats import find_format, open_checkpoint
from model.checkpoint.notes import list_notes
from model.decoder.llama import LlamaForCausalLM
from model.decoder.loading import load_model
from model.export.conversion import convert_checkpoint
from model.export.rank_files import write_rank_files
from model.layers.batch import Span
from model.layers.float8_linear import Float8ColumnParallelLinear
from model.planning import Workload, plan_ranks
from model.spec.config import build_config
from model.spec.scheme import read_scheme
from parallel.errors import CheckpointError, ConfigError
from tests.model.checkpoint.float8_files import BLOCK, FLOAT8, write_float8
from tests.model.families import write_model

PROMPT = [3, 17, 41, 5, 88]
FORMS = {
    "tensor": ("tensor", "compressed-tensors"),
    "channel": ("channel", "compressed-tensors"),
    "group": ("group", "compressed-tensors"),
    "block": ("block", "compressed-tensors"),
    "static": ("tensor", "compressed-tensors-static"),
    "fp8-block": ("block", "fp8"),
    "fp8-static": ("tensor", "fp8-static"),
    "fbgemm": ("channel", "fbgemm_fp8"),
    "modelopt": ("tensor", "modelopt"),
    "modelopt-file": ("tensor", "modelopt-file"),
}
Folders = Callable[[str], tuple[Path, Path]]


@pytest.fixture(scope="module")
def folders(tiny_llama: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """The FP8 folder of a form, and the folder of its dequantized weights."""
    made: dict[str, tuple[Path, Path]] = {}

    def build(form: str) -> tuple[Path, Path]:
        if form not in made:
            made[form] = write_float8(tiny_llama("nine_heads"), tmp_path_factory.mktemp("fp8") / form, *FORMS[form])
        return made[form]

    return build


def decode(model: LlamaForCausalLM) -> list[torch.Tensor]:
    """Hidden states of the prompt and of a token after it."""
    cache = model.build_cache(16)
    assert isinstance(model.layers[0].qkv_proj, Float8ColumnParallelLinear) == model.scheme.is_quantized("model.layers.0.self_attn.q_proj")
    return [model.forward([Span(cache, PROMPT)]), model.forward([Span(cache, [9])])]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("form", FORMS)
def test_a_model_equals_its_dequantized_form_on_any_number_of_ranks(
    one_thread: None, folders: Folders, run_ranks: Callable[..., list[Any]], form: str, dtype: str
) -> None:
    path, plain = folders(form)
    (expected,) = run_ranks(plain, 1, decode, dtype=dtype)
    for world_size in (1, 2, 3):
        for found in run_ranks(path, world_size, decode, dtype=dtype):
            assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True)), world_size


@pytest.mark.parametrize("form", ["tensor", "block", "fp8-block", "modelopt"])
def test_every_rank_reads_and_keeps_the_planned_bytes(folders: Folders, gather_ranks: Callable[..., list[Any]], form: str) -> None:
    source = open_checkpoint(folders(form)[0])
    config, scheme = build_config(source.config), read_scheme(source.config)
    stored = {name: info.form for name, info in source.tensors.items()}

    def load(collectives: Any) -> tuple[int, int]:
        model = LlamaForCausalLM(config, scheme, collectives, dtype="bfloat16", device=torch.device("cpu"))
        return load_model(model, source), model.weight_bytes

    for world_size in (1, 3):
        plans = plan_ranks(config, scheme, world_size, Workload(dtype="bfloat16", tokens=8), stored)
        for plan, (read_bytes, weight_bytes) in zip(plans, gather_ranks(world_size, load), strict=True):
            assert (read_bytes, weight_bytes) == (plan.file_bytes, plan.weight_bytes)


def test_blocks_equal_transformers_dequantization(tmp_path: Path, folders: Folders, run_ranks: Callable[..., list[Any]]) -> None:
    """Transformers needs whole blocks, so that the block divides every size here."""
    path, plain = folders("channel")
    block = [16, 16]
    tensors, config = load_file(path / "model.safetensors"), json.loads((path / "config.json").read_text())
    torch.manual_seed(1)
    kept, dense = dict(tensors), load_file(plain / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        linear, (rows, columns) = name.removesuffix(".weight"), tensors[name].shape
        del kept[f"{linear}.weight_scale"]
        kept[f"{linear}.weight_scale_inv"] = torch.rand(rows // 16, columns // 16) / 1000
        dense[name] = Fp8Dequantize(None)._dequantize_one(tensors[name], kept[f"{linear}.weight_scale_inv"])
    for folder, content, settings in (("fp8", kept, {"quant_method": "fp8", "weight_block_size": block}), ("dense", dense, None)):
        (tmp_path / folder).mkdir()
        save_file(content, tmp_path / folder / "model.safetensors")
        (tmp_path / folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    (expected,), (found,) = (run_ranks(tmp_path / folder, 1, decode) for folder in ("dense", "fp8"))
    assert torch.equal(expected[0], found[0])


@pytest.mark.parametrize("form", ["tensor", "channel", "block"])
def test_logits_equal_those_of_transformers(folders: Folders, run_ranks: Callable[..., list[Any]], form: str) -> None:
    path, _ = folders(form)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    expected = model(torch.tensor([PROMPT])).logits[0]

    def compute(model: LlamaForCausalLM) -> torch.Tensor:
        return model.logits_local(model.forward([Span(model.build_cache(16), PROMPT)]))

    (found,) = run_ranks(path, 1, compute)
    assert torch.allclose(found, expected, atol=1e-4)
    assert torch.equal(found.argmax(dim=1), expected.argmax(dim=1))


@pytest.mark.parametrize("form", ["fp8-block", "modelopt-file"])
def test_rank_files_and_converted_folders_hold_the_same_weights(
    tmp_path: Path, one_thread: None, folders: Folders, run_ranks: Callable[..., list[Any]], form: str
) -> None:
    path, plain = folders(form)
    source = open_checkpoint(path)
    write_rank_files(source, build_config(source.config), read_scheme(source.config), 3, tmp_path / "ranks")
    convert_checkpoint(source, tmp_path / "hf", None, lambda done, total: None)
    assert find_format(tmp_path / "hf") == "compressed-tensors"
    (expected,) = run_ranks(plain, 1, decode)
    for folder in ("ranks", "hf"):
        for found in run_ranks(tmp_path / folder, 2, decode):
            assert torch.equal(found[0], expected[0]), folder
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    hidden = loaded(torch.tensor([PROMPT]), output_hidden_states=True).hidden_states[-1][0]
    assert torch.allclose(hidden, expected[0], atol=1e-4)


def test_weights_that_are_not_numbers_stay_so(build_model: Callable[..., LlamaForCausalLM]) -> None:
    from model.backends.registry import find_backend
    from model.layers.linear import RowBlock
    from model.spec.linear_scheme import LinearScheme

    every = torch.arange(256, dtype=torch.uint8).view(FLOAT8).repeat(16, 1)
    for weight in (every, every[:, :127].contiguous()):
        linear = Float8ColumnParallelLinear(
            weight.shape[1], (RowBlock(16, 16),), LinearScheme(packed=False, float8=True), torch.float32, find_backend("cpu")
        )
        linear.assign(weight, torch.full((16, 1), 0.3), torch.device("cpu"))
        found, expected = linear.dequantize(0, 16), weight.float() * torch.tensor(0.3)
        assert torch.equal(found.isnan(), expected.isnan())
        assert torch.equal(found.nan_to_num(), expected.nan_to_num())


def test_inputs_that_are_not_quantized_are_noted(folders: Folders) -> None:
    for form in ("static", "fp8-static", "modelopt", "modelopt-file", "fbgemm"):
        source = open_checkpoint(folders(form)[0])
        assert any("FP8 linears" in note and "stay in the compute type" in note for note in list_notes(source, build_config(source.config)))


def change(folders: Folders, tmp_path: Path, form: str, edit: Callable[[dict[str, Any], dict[str, torch.Tensor]], None]) -> Path:
    path, _ = folders(form)
    config, tensors = json.loads((path / "config.json").read_text()), load_file(path / "model.safetensors")
    edit(config, tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


UP = "model.layers.0.mlp.up_proj"


def settings(config: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = config["quantization_config"]
    return found


@pytest.mark.parametrize(
    ("form", "edit", "message"),
    [
        ("fp8-block", lambda c, t: t.pop(f"{UP}.weight_scale_inv"), r"up_proj\.weight is FP8 with 0 scales, but needs one of"),
        ("fp8-block", lambda c, t: t.update({f"{UP}.weight_scale": torch.ones(1)}), "is FP8 with 2 scales"),
        ("fp8-block", lambda c, t: settings(c).update(weight_block_size=[128, 128]), r"has shape \[\d+, \d+\], but .* for blocks"),
        ("fp8-block", lambda c, t: settings(c).update(weight_block_size=None), r"has shape \[\d+, \d+\], .* for the whole weight"),
        ("fp8-block", lambda c, t: settings(c).update(weight_block_size=[128]), r"weight_block_size is \[128\], but two whole"),
        ("fp8-block", lambda c, t: settings(c).update(fmt="e5m2"), "fmt is 'e5m2', but only 'e4m3'"),
        ("fp8-block", lambda c, t: settings(c).update(expert_dtype="fp4"), "expert_dtype is 'fp4'"),
        ("modelopt", lambda c, t: settings(c).update(quant_algo="NVFP4"), "ModelOpt 'NVFP4' weights are not supported; there are FP8"),
        ("modelopt", lambda c, t: settings(c).update(quant_algo="MIXED_PRECISION"), "ModelOpt 'MIXED_PRECISION' weights"),
        ("modelopt", lambda c, t: settings(c).update(pre_quant_scale=True), "pre_quant_scale is True, but only False"),
        ("modelopt", lambda c, t: t.update({f"{UP}.weight_scale": torch.ones(5)}), r"weight_scale has shape \[5\], but a weight of"),
        ("channel", lambda c, t: t.pop(f"{UP}.weight_scale"), r"1 missing: model\.layers\.0\.mlp\.up_proj\.weight_scale"),
        ("channel", lambda c, t: t.update({f"{UP}.weight": t[f"{UP}.weight"].float()}), "is float32, but float8_e4m3fn is needed"),
        ("tensor", lambda c, t: t[f"{UP}.weight_scale"].fill_(torch.inf), "values of .*weight_scale are NaN or infinite"),
    ],
)  # fmt: skip
def test_scales_and_settings_that_do_not_fit_are_refused(
    tmp_path: Path, folders: Folders, form: str, edit: Callable[[dict[str, Any], dict[str, torch.Tensor]], None], message: str
) -> None:
    from model.checkpoint.stored_facts import check_facts

    path = change(folders, tmp_path, form, edit)
    with pytest.raises((CheckpointError, ConfigError), match=message):
        source = open_checkpoint(path)
        config, scheme = build_config(source.config), read_scheme(source.config)
        check_checkpoint(source, config, scheme)
        check_facts(source, config, scheme)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"num_bits": 4}, "num_bits of weights is 4, but only 8"),
        ({"strategy": "tensor_group"}, "strategy of weights is 'tensor_group', but only 'tensor'"),
        ({"strategy": "block", "block_structure": [128]}, r"block_structure is \[128\], but two whole numbers"),
        ({"strategy": "group"}, "weights lack group_size"),
        ({"symmetric": False}, "FP8 weights have to be 8 bits, symmetric"),
        ({"dynamic": True}, "dynamic of weights is True"),
        ({"num_bits": True}, "num_bits of weights is True"),
    ],
)
def test_other_float_schemes_of_compressed_tensors_are_refused(folders: Folders, weights: dict[str, Any], message: str) -> None:
    raw = json.loads((folders("channel")[0] / "config.json").read_text())
    raw["quantization_config"]["config_groups"]["group_0"]["weights"].update(weights)
    with pytest.raises(ConfigError, match=message):
        read_scheme(raw)


def test_the_written_scheme_is_the_read_one(folders: Folders) -> None:
    from model.spec.scheme import declare_scheme

    for form in FORMS:
        scheme = read_scheme(open_checkpoint(folders(form)[0]).config)
        assert read_scheme(declare_scheme({}, scheme)) == scheme
    assert scheme.name == "a16w8-fp8"
    assert read_scheme(open_checkpoint(folders("fp8-block")[0]).config).name == f"a16w8-fp8-b{BLOCK[0]}"


def gather_hidden(model: LlamaForCausalLM) -> torch.Tensor:
    return model.forward([Span(model.build_cache(16), PROMPT[:4])])


@pytest.mark.parametrize("form", ["tensor", "fbgemm"])
@pytest.mark.parametrize("family", ["phi3", "mixtral", "qwen2", "qwen3_moe"])
def test_every_kind_of_layer_equals_its_dequantized_form(
    tmp_path: Path, one_thread: None, run_ranks: Callable[..., list[Any]], family: str, form: str
) -> None:
    path, plain = write_float8(write_model(tmp_path / "source", family), tmp_path / "target", *FORMS[form])
    (expected,) = run_ranks(plain, 1, gather_hidden)
    for world_size in (1, 2):
        for found in run_ranks(path, world_size, gather_hidden):
            assert torch.equal(found, expected)


def test_blocks_that_fused_linears_share_are_refused(tmp_path: Path) -> None:
    path, _ = write_float8(write_model(tmp_path / "source", "phi3"), tmp_path / "target", *FORMS["fp8-block"])
    with pytest.raises(CheckpointError, match=r"weight_scale.* packs rows of self_attn\.q_proj and others together"):
        open_checkpoint(path)


@pytest.mark.parametrize("zero", [0.0, 1.0])
def test_zero_points_of_fp8_weights_have_to_be_0(tmp_path: Path, folders: Folders, zero: float) -> None:
    from model.checkpoint.stored_facts import find_contradictions

    path = change(folders, tmp_path, "channel", lambda c, t: t.update({f"{UP}.weight_zero_point": torch.full((208, 1), zero).to(FLOAT8)}))
    source = open_checkpoint(path)
    config, scheme = build_config(source.config), read_scheme(source.config)
    check_checkpoint(source, config, scheme)
    problems = list(find_contradictions(source, config, scheme))
    assert len(problems) == bool(zero) and all("declares symmetric values, but 208 of 208 zero points" in one for one in problems)
