"""The files of configs/: each loads, explains its keys and describes the model in its name."""

from pathlib import Path

import pytest

from launcher.settings.yaml_settings import read_settings
from model.spec.config import LlamaConfig

CONFIGS = sorted((Path(__file__).resolve().parent.parent / "configs").glob("*.yaml"))
PARAMETERS = {
    "llama2_7b": 6_738_415_616,
    "llama2_13b": 13_015_864_320,
    "llama2_70b": 68_976_648_192,
    "smollm2_135m": 134_515_008,
}
"""Start of a file's name: parameters of the published model."""


def count_parameters(config: LlamaConfig) -> int:
    query, key_value = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    attention = 2 * config.hidden_size * (query + key_value)
    feed_forward = 3 * config.hidden_size * config.intermediate_size
    embeddings = config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)
    return embeddings + config.num_hidden_layers * (attention + feed_forward + 2 * config.hidden_size) + config.hidden_size


def test_there_are_configs() -> None:
    assert {path.name for path in CONFIGS} >= {
        "llama2_7b.yaml",
        "llama2_13b_rtn.yaml",
        "llama2_70b.yaml",
        "llama2_70b_rtn.yaml",
        "llama2_70b_smooth_quant.yaml",
        "smollm2_135m_rtn.yaml",
    }


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_builds_the_model_of_its_name(path: Path) -> None:
    settings = read_settings(path)
    expected = next(count for name, count in PARAMETERS.items() if path.stem.startswith(name))
    assert count_parameters(settings.build_model_config()) == expected
    assert settings.warnings == ()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_fits_its_number_of_ranks(path: Path) -> None:
    settings = read_settings(path)
    assert settings.model_parallel is not None
    assert settings.build_model_config().num_attention_heads >= settings.model_parallel


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_is_quantized_as_its_name_says(path: Path) -> None:
    quantization = read_settings(path).quantization
    method = path.stem.partition("b_")[2] if path.stem.startswith("llama2") else path.stem.partition("m_")[2]
    assert (quantization.quant_method if quantization else "") == method


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_value_of_a_config_has_a_comment(path: Path) -> None:
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip() and not line.startswith("#")]
    bare = [line for line in lines if " # " not in line and not line.endswith(":")]
    assert bare == []


@pytest.mark.parametrize("path", [path for path in CONFIGS if path.stem.startswith("llama2")], ids=lambda path: path.stem)
def test_config_agrees_with_the_original(path: Path, shared_dir: Path) -> None:
    ours, original = read_settings(path), read_settings(shared_dir / "data/mindformers_configs" / f"predict_{path.name}")
    assert ours.build_model_config() == original.build_model_config()
    for name in ("model_parallel", "seq_length", "seed", "compute_dtype", "sampling", "quantization", "vocab_file", "load_checkpoint"):
        assert getattr(ours, name) == getattr(original, name), name
