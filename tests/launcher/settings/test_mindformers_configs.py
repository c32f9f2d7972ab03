"""Every YAML of MindFormers 1.3 to 2.1 at hand, as it is: which load, as which model, and why the others are refused."""

from pathlib import Path

import pytest

from launcher.settings.yaml_settings import read_settings
from model.spec.config import build_config
from model.spec.rope_scaling import RopeScaling
from parallel.errors import ConfigError

LLAMA_2 = {"7b": (4096, 32, 32, 11008), "13b": (5120, 40, 40, 13824), "70b": (8192, 80, 8, 28672)}
LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
LOADS: dict[str, tuple[tuple[int, int, int, int], float | None]] = {
    "predict_llama2_7b": (LLAMA_2["7b"], None),
    **{f"predict_llama2_13b{rest}": (LLAMA_2["13b"], None) for rest in ("", "_ptq", "_rtn", "_smooth_quant")},
    **{f"predict_llama2_70b{rest}": (LLAMA_2["70b"], None) for rest in ("", "_rtn", "_smooth_quant")},
    "predict_llama2_7b_prefixtuning": (LLAMA_2["7b"], None),
    "predict_llama2_7b_ptuning2": (LLAMA_2["7b"], None),
    "predict_llama2_7b_slora": (LLAMA_2["7b"], None),
    "v1.5.0/predict_llama2_13b_ptq": (LLAMA_2["13b"], None),
    "v1.5.0/predict_llama2_13b_rtn": (LLAMA_2["13b"], None),
    "v1.5.0/predict_llama2_70b_rtn": (LLAMA_2["70b"], None),
    "v1.5.0/predict_llama3_1_8b": ((4096, 32, 8, 14336), 8.0),
    "v1.5.0/predict_llama3_2_3b": ((3072, 28, 8, 8192), 32.0),
    "v1.5.0/predict_llama3_8b": ((4096, 32, 8, 14336), None),
    "v1.5.0/predict_yi_34b_chat": ((7168, 60, 8, 20480), None),
    "v1.5.0/predict_yi_6b": ((4096, 32, 4, 11008), None),
    "v1.6.0/predict_llama3_1_70b": ((8192, 80, 8, 28672), 8.0),
    "v1.7.0/predict_llama3_1_8b": ((4096, 32, 8, 14336), 8.0),
}
"""Hidden size, layers, KV heads, feed-forward; factor of Llama 3's rope scaling."""
QWEN_2 = {
    "v1.5.0/predict_qwen2_5_7b_instruct": (3584, 28, 4, 18944),
    "v1.5.0/predict_qwen2_7b_instruct": (3584, 28, 4, 18944),
    "v1.6.0/predict_qwen2_5_32b_instruct": (5120, 64, 8, 27648),
}
FOLDERS = (
    "v1.7.0/predict_qwen2",
    "v2.1.0/predict_qwen2",
    "v1.7.0/predict_qwen3",
    "v1.7.0/predict_qwen3_moe",
    "v2.1.0/predict_qwen3",
    "v2.1.0/predict_qwen3_moe",
)
"""Whose model is described by the folder that pretrained_model_dir names."""


@pytest.fixture(scope="module")
def folder(shared_dir: Path) -> Path:
    folder = shared_dir / "data" / "mindformers_configs"
    if not folder.is_dir():
        pytest.skip("no data/mindformers_configs among the shared data")
    return folder


def test_every_file_has_an_expectation(folder: Path) -> None:
    found = {str(file.relative_to(folder).with_suffix("")) for file in folder.rglob("*.yaml")}
    known = {*LOADS, *FOLDERS, *QWEN_2}
    assert found == known


@pytest.mark.parametrize("name", LOADS)
def test_a_plain_llama_loads(folder: Path, name: str) -> None:
    (hidden, layers, kv_heads, width), factor = LOADS[name]
    settings = read_settings(folder / f"{name}.yaml")
    config = settings.build_model_config()
    found = (config.hidden_size, config.num_hidden_layers, config.num_key_value_heads, config.intermediate_size)
    assert found == (hidden, layers, kv_heads, width)
    assert config.rope_scaling == (RopeScaling(factor=factor, **LLAMA3_ROPE) if factor else None)  # type: ignore[arg-type]
    assert [warning for warning in settings.warnings if "pet_config" not in warning] == []


@pytest.mark.parametrize("name", FOLDERS)
def test_a_file_that_names_a_folder_leaves_the_model_to_it(folder: Path, name: str) -> None:
    settings = read_settings(folder / f"{name}.yaml")
    assert settings.load_checkpoint == settings.pretrained_model_dir
    assert settings.pretrained_model_dir
    assert settings.build_model_values() is None
    assert settings.compute_dtype == "bfloat16"


@pytest.mark.parametrize("name", QWEN_2)
def test_a_llama_config_with_biases_is_qwen_2(folder: Path, name: str) -> None:
    config = read_settings(folder / f"{name}.yaml").build_model_config()
    found = (config.hidden_size, config.num_hidden_layers, config.num_key_value_heads, config.intermediate_size)
    assert found == QWEN_2[name]
    assert (config.model_type, config.attention_bias, config.output_bias) == ("qwen2", True, False)


@pytest.mark.parametrize("name", ["v1.7.0/predict_qwen2", "v1.7.0/predict_qwen3"])
def test_biases_of_another_checkpoint_are_refused(folder: Path, name: str) -> None:
    settings = read_settings(folder / f"{name}.yaml")
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": 64,
    }
    qwen, llama = (build_config({**sizes, "model_type": kind}) for kind in ("qwen2", "llama"))
    settings.compare_model_config(qwen, "here")
    if settings.biased:
        with pytest.raises(ConfigError, match="qkv_has_bias is True against False"):
            settings.compare_model_config(llama, "here")
    else:
        settings.compare_model_config(llama, "here")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{type: LlamaConfig, qkv_has_bias: True, add_qkv_bias: False}", "qkv_has_bias is True but add_qkv_bias is False"),
        ("{type: Qwen3Config, add_qkv_bias: True}", "qkv_has_bias is True, but models of type Qwen3Config have other biases"),
        ("{type: GPTConfig}", "model.model_config.type is 'GPTConfig'"),
    ],
)
def test_contradicting_families_are_refused(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "a.yaml").write_text(f"model: {{model_config: {text}}}")
    with pytest.raises(ConfigError, match=words):
        read_settings(tmp_path / "a.yaml")
