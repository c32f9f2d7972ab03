"""LoRA adapters that cannot be served are refused with the value at fault; what PEFT ignores is ignored."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file

from model.checkpoint.fingerprint import CheckpointReplacedError, check_unchanged, read_state
from model.checkpoint.formats import open_checkpoint
from model.checkpoint.lora_folder import LoraFolder
from model.spec.config import LlamaConfig, build_config
from model.spec.lora_config import read_lora_config
from parallel.errors import CheckpointError
from tests.model.adapters import write_adapter
from tests.model.families import write_model

Q = "base_model.model.model.layers.0.self_attn.q_proj"
EDITS: dict[str, tuple[dict[str, Any], str]] = {
    "kind": ({"peft_type": "LOHA"}, "peft_type is 'LOHA', but only LORA"),
    "no kind": ({"peft_type": None}, "peft_type is None"),
    "task": ({"task_type": "SEQ_CLS"}, "task_type is 'SEQ_CLS', but an adapter for CAUSAL_LM"),
    "dora": ({"use_dora": True}, "use_dora is True, but DoRA"),
    "whole weights": ({"modules_to_save": ["lm_head"]}, "modules_to_save is ['lm_head']"),
    "bias": ({"bias": "lora_only"}, "bias is 'lora_only'"),
    "bias of B": ({"lora_bias": True}, "lora_bias is True"),
    "transposed": ({"fan_in_fan_out": True}, "fan_in_fan_out is True"),
    "repeated": ({"layer_replication": [[0, 1], [0, 1]]}, "layer_replication is"),
    "tokens": ({"trainable_token_indices": [1]}, "trainable_token_indices is [1]"),
    "parameters": ({"target_parameters": ["mlp.experts.gate_up_proj"]}, "target_parameters is"),
    "activated": ({"alora_invocation_tokens": [5, 6]}, "alora_invocation_tokens is [5, 6]"),
    "pissa": ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', which changes the base model's weights"),
    "a later key": ({"use_new_thing": 3}, "use_new_thing is 3, but this key of PEFT is not supported"),
    "rank": ({"r": 0}, "r is 0, but a rank from 1 to 1024"),
    "another rank": ({"r": 8}, "has shape [4, 144], but rank 8 and the base model need [8, 144]"),
    "alpha": ({"lora_alpha": float("nan")}, "lora_alpha is nan, but a number"),
    "nested": ({"rank_pattern": {"(a+)+b": 3}}, "rank_pattern has the pattern '(a+)+b', but repeated groups"),
    "broken": ({"alpha_pattern": {"(": 3}}, "alpha_pattern has the pattern '(', which is not valid"),
    "unknown target": ({"target_modules": ["q_proj", "v_proj", "c_attn"]}, "target_modules names c_attn, but no linear"),
    "missing target": ({"target_modules": ["q_proj", "v_proj", "o_proj"]}, "holds no update of model.layers.0.self_attn.o_proj"),
    "unnamed": ({"target_modules": ["q_proj"]}, "which the target_modules of"),
    "targets": ({"target_modules": [1]}, "target_modules is [1], but a list of names"),
    "layers": ({"layers_to_transform": ["0"]}, "layers_to_transform is ['0']"),
}
TENSORS: dict[str, tuple[str, tuple[int, ...], str]] = {
    "head": ("base_model.model.lm_head.lora_A.weight", (4, 144), "adapters of the output head"),
    "embedding": ("base_model.model.model.embed_tokens.lora_embedding_A", (4, 97), "adapters of embeddings"),
    "dora": (f"{Q}.lora_magnitude_vector.weight", (144,), "DoRA is not supported"),
    "bias": (f"{Q}.lora_B.bias", (144,), "trained biases"),
    "norm": ("base_model.model.model.norm.weight", (144,), "trained norms"),
    "experts": ("base_model.model.model.layers.0.mlp.experts.0.up_proj.lora_A.weight", (4, 144), "adapters of experts"),
    "no such linear": (
        "base_model.model.model.layers.0.mlp.fc1.lora_A.weight",
        (4, 144),
        "layers.0.mlp.fc1, which the base model does not",
    ),
    "no such layer": ("base_model.model.model.layers.7.mlp.up_proj.lora_A.weight", (4, 144), "layers.7.mlp.up_proj, which the base"),
    "no B": ("base_model.model.model.layers.0.mlp.up_proj.lora_A.weight", (4, 144), "lacks lora_B of model.layers.0.mlp.up_proj"),
    "no name of PEFT": ("layers.0.q.a", (4, 144), "only lora_A and lora_B of linears"),
}


@pytest.fixture(scope="module")
def base(tiny_llama: Callable[[str], Path]) -> LlamaConfig:
    return build_config(open_checkpoint(tiny_llama("nine_heads")).config)


@pytest.fixture
def adapter(tmp_path: Path, written: Path) -> Path:
    """A copy to change."""
    for file in written.iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


@pytest.fixture(scope="module")
def written(tiny_llama: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(tiny_llama("nine_heads"), tmp_path_factory.mktemp("adapter"), target_modules=["q_proj", "v_proj"])


def edit(folder: Path, **values: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.mark.parametrize("case", EDITS)
def test_settings_that_cannot_be_served_are_refused(case: str, adapter: Path, base: LlamaConfig) -> None:
    values, words = EDITS[case]
    edit(adapter, **values)
    with pytest.raises(CheckpointError) as caught:
        LoraFolder(adapter, base)
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_cannot_be_served_are_refused(case: str, adapter: Path, base: LlamaConfig) -> None:
    name, shape, words = TENSORS[case]
    file = adapter / "adapter_model.safetensors"
    save_file({**load_file(file), name: torch.zeros(shape)}, file)
    edit(adapter, target_modules="all-linear")
    with pytest.raises(CheckpointError) as caught:
        LoraFolder(adapter, base)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_an_adapter_of_another_model_is_refused_with_its_base(adapter: Path, tiny_llama: Callable[[str], Path]) -> None:
    edit(adapter, base_model_name_or_path="org/trained-on-this")
    other = build_config(open_checkpoint(tiny_llama("tied")).config)
    with pytest.raises(CheckpointError, match=r"has shape \[4, 144\], but rank 4 and the base model need \[4, 64\]; .*org/trained-on-this"):
        LoraFolder(adapter, other)


def test_incomplete_folders_are_refused(adapter: Path, base: LlamaConfig) -> None:
    weights = adapter / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    with pytest.raises(CheckpointError, match="truncated"):
        LoraFolder(adapter, base)
    weights.rename(adapter / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"holds adapter_model.bin, a pickle"):
        LoraFolder(adapter, base)
    (adapter / "adapter_model.bin").unlink()
    with pytest.raises(CheckpointError, match=r"has no adapter_model.safetensors"):
        LoraFolder(adapter, base)
    (adapter / "adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"is no LoRA adapter: it has no adapter_config.json"):
        LoraFolder(adapter, base)


def test_a_missing_layer_of_stored_linears_that_hold_several_is_refused(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", "phi3")
    adapter = write_adapter(folder, tmp_path / "adapter", target_modules=["qkv_proj", "o_proj"])
    file = adapter / "adapter_model.safetensors"
    save_file({name: tensor for name, tensor in load_file(file).items() if "layers.1.self_attn.qkv_proj" not in name}, file)
    with pytest.raises(CheckpointError, match=r"holds no update of model.layers.1.self_attn.qkv_proj"):
        LoraFolder(adapter, build_config(open_checkpoint(folder).config))


def test_a_missing_layer_is_refused(adapter: Path, base: LlamaConfig) -> None:
    file = adapter / "adapter_model.safetensors"
    save_file({name: tensor for name, tensor in load_file(file).items() if "layers.1.self_attn.v_proj" not in name}, file)
    with pytest.raises(CheckpointError, match=r"holds no update of model.layers.1.self_attn.v_proj"):
        LoraFolder(adapter, base)


def test_adapters_of_experts_are_refused(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", "mixtral")
    adapter = write_adapter(folder, tmp_path / "adapter", target_modules=["gate", "q_proj"])
    with pytest.raises(CheckpointError, match=r"target_parameters is \['gate.weight'\]"):
        LoraFolder(adapter, build_config(open_checkpoint(folder).config))


def test_a_replaced_adapter_is_noticed(adapter: Path, base: LlamaConfig) -> None:
    opened = LoraFolder(adapter, base)
    before = opened.fingerprint
    check_unchanged(before, lambda: LoraFolder(adapter, base).fingerprint)
    edit(adapter, lora_alpha=9)
    with pytest.raises(CheckpointReplacedError, match="its config has other values"):
        check_unchanged(before, lambda: read_state(LoraFolder(adapter, base)))
    assert LoraFolder(adapter, base).fingerprint.content != before.content


def test_ranks_and_scales_are_those_of_peft(adapter: Path) -> None:
    ranks = {"q_proj": 7, r"layers\.1\.mlp\.down_proj": 2, r"^model\.layers\.0\..*k_proj": 3, "layers.[12].self_attn.v_proj": 5}
    alphas = {"self_attn.q_proj": 3, r".*down_proj": 0.5}
    for stabilized in (False, True):
        edit(adapter, rank_pattern=ranks, alpha_pattern=alphas, use_rslora=stabilized)
        found = read_lora_config(adapter)
        for layer in range(3):
            for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.down_proj", "mlp.my_q_proj"):
                full = f"model.layers.{layer}.{name}"
                rank = ranks.get(get_pattern_key(ranks, full), 4)
                alpha = alphas.get(get_pattern_key(alphas, full), 8)
                assert found.find_rank(full) == rank
                assert found.find_scale(full) == alpha / (math.sqrt(rank) if stabilized else rank)
