"""Stored tensors against the settings: what differs is used as transformers uses it, or refused before any rank starts."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM as TransformersLlama

from model.checkpoint.completeness import check_checkpoint
from model.checkpoint.formats import open_checkpoint
from model.checkpoint.notes import list_dropped, list_notes
from model.checkpoint.stored_facts import check_facts, find_contradictions
from model.decoder.llama import LlamaForCausalLM
from model.layers.batch import Span
from model.spec.config import build_config
from model.spec.linear_scheme import LinearScheme
from model.spec.scheme import Scheme, declare_scheme, read_scheme
from model.spec.weights import plan_weights
from model.text.tokenizer import read_tokenizer
from parallel.errors import CheckpointError
from tandem.auto_model import AutoModel
from tests.model import mindspore_files
from tests.model.checkpoint.conftest import LLAMA, make_awq, make_gptq, make_tensors, write_folder

TIED = LLAMA | {"tie_word_embeddings": True, "max_position_embeddings": 64}
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
INT4 = Scheme(LinearScheme(bits=4, group_size=16), ("lm_head",))
STATIC = Scheme(LinearScheme(packed=False, activation="tensor"), ("lm_head",), "tensor")
PROMPT = [[3, 7, 1, 9]]


def make_float() -> dict[str, torch.Tensor]:
    torch.manual_seed(5)
    return {name: torch.randn(spec.shape).half() for name, spec in plan_weights(build_config(LLAMA), Scheme()).items()}


def decode(folder: Path) -> list[int]:
    found: list[int] = AutoModel.from_pretrained(folder, dtype="float32").generate(PROMPT, max_new_tokens=8)[0].tolist()
    return found[len(PROMPT[0]) :]


def decode_with_transformers(folder: Path) -> list[int]:
    model = TransformersLlama.from_pretrained(folder, dtype=torch.float32).eval()
    out = model.generate(torch.tensor(PROMPT), max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    ids: list[int] = out[0, len(PROMPT[0]) :].tolist()
    return ids


def open_whole(folder: Path) -> tuple[Any, Any, Scheme]:
    source = open_checkpoint(folder)
    config, scheme = build_config(source.config), read_scheme(source.config)
    check_checkpoint(source, config, scheme)
    return source, config, scheme


@pytest.mark.parametrize("equal", [True, False])
def test_a_tied_head_is_loaded_where_its_values_differ_as_in_transformers(tmp_path: Path, equal: bool) -> None:
    tensors = make_float()
    tensors[HEAD] = tensors[EMBEDDING].clone() if equal else tensors[HEAD]
    folder = write_folder(tmp_path / "m", tensors, TIED | {"eos_token_id": None})
    source, config, _ = open_whole(folder)
    assert config.tie_word_embeddings is equal
    assert any("tie_word_embeddings is true, but" in note for note in list_notes(source, config)) is not equal
    assert list_dropped(source, config, Scheme()) == ([HEAD] if equal else [])
    assert decode(folder) == decode_with_transformers(folder)


@pytest.mark.parametrize("row", [0, 48, 95, None])
def test_a_tied_head_of_mindspore_has_the_rows_of_the_embedding(tmp_path: Path, row: int | None) -> None:
    tensors = mindspore_files.make_float()
    tensors["lm_head.weight"] = tensors["model.tok_embeddings.embedding_weight"].clone()
    if row is not None:
        tensors["lm_head.weight"][row] += 1
    mindspore_files.write_ckpt(tmp_path / "m.ckpt", tensors)
    (tmp_path / "config.json").write_text(json.dumps(mindspore_files.CONFIG | {"tie_word_embeddings": True}))
    source = open_checkpoint(tmp_path / "m.ckpt")
    found = list(find_contradictions(source, build_config(source.config), Scheme()))
    assert len(found) == (row is not None)
    assert all("tie_word_embeddings is true, but lm_head.weight differs from model.embed_tokens.weight" in line for line in found)


@settings(max_examples=20, deadline=None)
@given(place=st.integers(0, 32 * 32 - 1), bit=st.integers(0, 15))
def test_one_bit_of_the_head_unties_it(tmp_path_factory: pytest.TempPathFactory, place: int, bit: int) -> None:
    tensors = make_float()
    tensors[HEAD] = tensors[EMBEDDING].clone()
    tensors[HEAD].view(torch.int16).view(-1)[place] ^= (1 << bit) - (1 << 16 if bit == 15 else 0)
    folder = write_folder(tmp_path_factory.getbasetemp() / "one-bit", tensors, TIED)
    assert build_config(open_checkpoint(folder).config).tie_word_embeddings is False


@pytest.mark.parametrize(("attention", "mlp"), [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("world_size", [1, 2])
def test_biases_give_the_logits_of_transformers_on_any_number_of_ranks(
    run_ranks: Callable[..., list[torch.Tensor]], tmp_path: Path, attention: bool, mlp: bool, world_size: int
) -> None:
    raw = LLAMA | {"num_key_value_heads": 2, "attention_bias": attention, "mlp_bias": mlp, "max_position_embeddings": 64}
    torch.manual_seed(9)
    tensors = {name: torch.randn(spec.shape).half() / 8 for name, spec in plan_weights(build_config(raw), Scheme()).items()}
    assert sum(name.endswith(".bias") for name in tensors) == 4 * attention + 3 * mlp
    folder = write_folder(tmp_path / "m", tensors, raw)
    found = run_ranks(folder, world_size, compute_logits)[0]
    model = TransformersLlama.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = model(torch.tensor(PROMPT)).logits[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(found, run_ranks(folder, 1, compute_logits)[0])


def compute_logits(model: LlamaForCausalLM) -> torch.Tensor:
    """float32 [T, vocabulary] of the prompt."""
    logits = model.logits_local(model([Span(model.build_cache(16), PROMPT[0])]))
    return model.collectives.gather_columns(logits, model.shares.vocab)


def strip(name: str) -> str:
    return name.removeprefix("model.")


RENAMES: dict[str, Callable[[str], str]] = {
    "none": strip,
    "transformer.": lambda name: name if name == HEAD else "transformer." + strip(name),
    "base_model.model.": lambda name: "base_model.model." + name,
    "language_model.": lambda name: "language_model." + name,
    "module.": lambda name: "module." + name,
}


@pytest.mark.parametrize("prefix", RENAMES)
def test_a_uniform_prefix_is_taken_off(tmp_path: Path, prefix: str) -> None:
    tensors = make_float()
    plain = write_folder(tmp_path / "plain", tensors, LLAMA)
    renamed = write_folder(tmp_path / "renamed", {RENAMES[prefix](name): tensor for name, tensor in tensors.items()}, LLAMA)
    assert open_whole(renamed)[0].tensors.keys() == tensors.keys()
    assert decode(renamed) == decode(plain)


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (
            "vision_tower.weight",
            "differ by the prefix 'language_model.model.' .* but not vision_tower.weight: give a",
        ),
        ("model.layers.0.self_attn.q_proj.weight", "but not model.layers.0.self_attn.q_proj.weight"),
        ("lm_head.weight", "two tensors have the same name"),
        ("language_model.model.layers.0.self_attn.q_proj.lora_A.weight", "a part of an adapter: merge it"),
    ],
)
def test_a_prefix_that_does_not_stand_before_all_names_is_refused(tmp_path: Path, extra: str, words: str) -> None:
    tensors = {f"language_model.{name}": tensor for name, tensor in make_float().items()}
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(write_folder(tmp_path / "m", tensors | {extra: torch.zeros(1)}, LLAMA))


@pytest.mark.parametrize("names", [("model-fp16.safetensors",), ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")])
def test_files_without_an_index_are_loaded(tmp_path: Path, names: tuple[str, ...]) -> None:
    tensors = make_float()
    plain, folder = write_folder(tmp_path / "plain", tensors, LLAMA), write_folder(tmp_path / "m", {}, LLAMA)
    (folder / "model.safetensors").unlink()
    for number, file in enumerate(names):
        save_file({name: tensors[name] for name in list(tensors)[number :: len(names)]}, folder / file)
    (folder / "adapter_model.safetensors").write_bytes(b"not looked at")
    assert decode(folder) == decode(plain)


def test_a_part_that_is_missing_or_doubled_is_refused(tmp_path: Path) -> None:
    tensors, folder = make_float(), write_folder(tmp_path / "m", {}, LLAMA)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00003.safetensors")
    save_file(tensors, folder / "model-00003-of-00003.safetensors")
    with pytest.raises(CheckpointError, match=r"without an index, but model-00002-of-00003\.safetensors is missing"):
        open_checkpoint(folder)
    save_file({HEAD: tensors[HEAD]}, folder / "model-00002-of-00003.safetensors")
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is in both .*00002-of-00003.* and .*00003-of-00003"):
        open_checkpoint(folder)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_zero_point_that_is_not_0_contradicts_a_symmetric_scheme(tmp_path: Path, data: st.DataObject) -> None:
    kind, scheme = data.draw(st.sampled_from([("weight", INT4), ("packed", INT4), ("input", STATIC), ("k", STATIC)]))
    prefix, zeros = "model.layers.0.self_attn.q_proj", torch.zeros(1, dtype=torch.int8)
    name = {"input": f"{prefix}.input_zero_point", "k": "model.layers.0.self_attn.k_zero_point"}.get(kind, f"{prefix}.weight_zero_point")
    if kind == "weight":
        zeros = torch.zeros(32, 2, dtype=torch.int8)
    elif kind == "packed":
        zeros = torch.full((4, 2), 0x88888888 - (1 << 32), dtype=torch.int32)
    folder = write_folder(tmp_path / "m", make_small_scales(scheme) | {name: zeros}, declare_scheme(LLAMA, scheme))
    assert list(find_contradictions(*open_whole(folder))) == []
    place = data.draw(st.integers(0, zeros.numel() - 1))
    zeros.view(-1)[place] += data.draw(st.integers(1, 100))
    write_folder(folder, make_small_scales(scheme) | {name: zeros}, declare_scheme(LLAMA, scheme))
    with pytest.raises(CheckpointError, match=rf"but 1 of {zeros.numel()} .* in {name} are not 0: .*set symmetric to false"):
        check_facts(*open_whole(folder))


def make_small_scales(scheme: Scheme) -> dict[str, torch.Tensor]:
    tensors = make_tensors(scheme)
    for name, spec in plan_weights(build_config(LLAMA), scheme).items():
        if name.endswith("weight_shape"):
            tensors[name] = torch.tensor([32 if "k_proj" not in name and "v_proj" not in name else 16, 32])
        assert tensors[name].shape == spec.shape
    return tensors


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("part", ["mlp.up_proj.weight_scale", "mlp.up_proj.input_scale", "self_attn.k_scale"])
def test_scales_that_are_no_numbers_are_refused(tmp_path: Path, part: str, value: float) -> None:
    tensors, part = make_small_scales(STATIC), f"model.layers.0.{part}"
    tensors[part].view(-1)[0] = value
    with pytest.raises(CheckpointError, match=rf"1 of \d+ values of {part} are NaN or infinite"):
        check_facts(*open_whole(write_folder(tmp_path / "m", tensors, declare_scheme(LLAMA, STATIC))))


def test_a_stored_shape_that_contradicts_the_config_is_refused(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight_shape"
    tensors = make_small_scales(INT4) | {name: torch.tensor([32, 31])}
    with pytest.raises(CheckpointError, match=rf"{name} is \[32, 31\], but the config needs \[32, 32\]"):
        check_facts(*open_whole(write_folder(tmp_path / "m", tensors, declare_scheme(LLAMA, INT4))))


@pytest.mark.parametrize(
    ("declared", "stored", "words"),
    [
        (
            "gptq",
            8,
            "but 9, as where a file of checkpoint_format 'gptq_v2' is read as 'gptq': set checkpoint_format to 'gptq_v2'",
        ),
        (
            "gptq_v2",
            7,
            "but 7, as where a file of checkpoint_format 'gptq' is read as 'gptq_v2': set checkpoint_format to 'gptq'",
        ),
        ("gptq", 3, "are not 8, but 4: quantize or copy it again"),
        ("gptq", None, "are not 8: the weights are not symmetric; set sym to false"),
    ],
)
def test_zero_points_of_gptq_are_checked_with_advice_that_is_right(tmp_path: Path, declared: str, stored: int | None, words: str) -> None:
    folder = make_gptq(tmp_path / "m")
    tensors, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    config["quantization_config"]["checkpoint_format"] = declared
    for name in [name for name in tensors if name.endswith("qzeros")]:
        word = 0x11111111 * stored if stored is not None else 0x12345671
        tensors[name] = torch.full_like(tensors[name], word - (1 << 32) if word >= 1 << 31 else word)
    write_folder(folder, tensors, config)
    with pytest.raises(CheckpointError, match=words):
        check_facts(*open_whole(folder))
    settings_words = {"gptq_v2'": {"checkpoint_format": "gptq_v2"}, "gptq'": {"checkpoint_format": "gptq"}, "false": {"sym": False}}
    advice = next((change for end, change in settings_words.items() if words.endswith(end)), None)
    if advice is not None:
        config["quantization_config"] |= advice
        write_folder(folder, tensors, config)
        check_facts(*open_whole(folder))


def test_act_order_that_is_not_declared_is_refused_and_right_when_it_is(tmp_path: Path) -> None:
    folder = make_gptq(tmp_path / "m")
    tensors, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    tensors["model.layers.0.mlp.up_proj.g_idx"] = tensors["model.layers.0.mlp.up_proj.g_idx"].flip(0)
    write_folder(folder, tensors, config)
    with pytest.raises(CheckpointError, match=r"32 of 32 entries of .*up_proj\.g_idx are others; set desc_act to true"):
        check_facts(*open_whole(folder))
    config["quantization_config"]["desc_act"] = True
    write_folder(folder, tensors, config)
    check_facts(*open_whole(folder))


def test_awq_without_zero_points_says_which_setting_is_wrong(tmp_path: Path) -> None:
    folder = make_awq(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["zero_point"] = False
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="the weights are not symmetric; set zero_point to true"):
        check_facts(*open_whole(folder))


def test_rotary_frequencies_are_compared_and_reported(tmp_path: Path) -> None:
    exact = 10000.0 ** (-torch.arange(0, 16, 2) / 16)
    for value, notes in ((exact.bfloat16(), 0), (exact * 2, 1), (torch.ones(3), 1)):
        folder = write_folder(tmp_path / "m", make_float() | {"model.layers.0.self_attn.rotary_emb.inv_freq": value}, LLAMA)
        source, config, _ = open_whole(folder)
        assert len(list_notes(source, config)) == notes


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ("model.layers.0.self_attn.q_proj.bias", "biases are supported only where attention_bias or mlp_bias is true; 1 unexpected"),
        ("model.layers.1.self_attn.q_proj.weight", "num_hidden_layers is 1, but there are tensors of layer 1; 1 unexpected"),
        ("model.layers.0.mlp.experts.0.w1.weight", "its model_type has no such experts; 1 unexpected"),
        ("score.weight", "a classification head is not supported; 1 unexpected"),
    ],
)
def test_what_an_unexpected_tensor_means_is_said(tmp_path: Path, extra: str, words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        open_whole(write_folder(tmp_path / "m", make_float() | {extra: torch.zeros(2)}, LLAMA))


def test_the_case_of_zero_points_is_right_when_the_advice_is_followed(shared_dir: Path, tmp_path: Path) -> None:
    case = shared_dir / "cases" / "12d-gptq-v1-name-v2-zeros" / "model"
    if not case.is_dir():
        pytest.skip("no such case among the shared data")
    with pytest.raises(CheckpointError, match="checkpoint_format to 'gptq_v2' in quantization_config of"):
        check_facts(*open_whole(case))
    folder = tmp_path / "m"
    shutil.copytree(case, folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["checkpoint_format"] = "gptq_v2"
    (folder / "config.json").chmod(0o644)
    (folder / "config.json").write_text(json.dumps(config))
    prompt = read_tokenizer(folder).encode("Once upon a time")
    found = AutoModel.from_pretrained(folder, dtype="float32").generate([prompt], max_new_tokens=10)[0].tolist()
    assert found[len(prompt) :] == [310, 58, 397, 44, 324, 354, 473, 33, 505, 451]
