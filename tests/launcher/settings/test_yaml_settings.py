"""Reading a MindFormers YAML: what each value means and how it meets the checkpoint."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import yaml

from launcher.settings.yaml_settings import Settings, TandemSettings, open_settings, read_settings
from model.spec.rope_scaling import RopeScaling, attention_factor, compute_frequencies
from parallel.errors import ConfigError

ORIGINALS = (
    "predict_llama2_13b predict_llama2_13b_ptq predict_llama2_13b_rtn predict_llama2_13b_smooth_quant predict_llama2_70b"
    " predict_llama2_70b_rtn predict_llama2_70b_smooth_quant predict_llama2_7b predict_llama2_7b_prefixtuning"
    " predict_llama2_7b_ptuning2 predict_llama2_7b_slora"
).split()


def read_text(tmp_path: Path, text: str) -> Settings:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return read_settings(path)


def read_raw(tmp_path: Path, raw: dict[str, Any]) -> Settings:
    return read_text(tmp_path, yaml.safe_dump(raw))


def read_model(tmp_path: Path, **keys: Any) -> Settings:
    return read_raw(tmp_path, {"model": {"model_config": keys}})


# The files of MindFormers.


@pytest.mark.parametrize("name", ORIGINALS)
def test_original_file_loads_as_it_is(shared_dir: Path, name: str) -> None:
    settings = read_settings(shared_dir / "data/mindformers_configs" / f"{name}.yaml")
    size = {"13b": (5120, 13824, 40), "70b": (8192, 28672, 80), "7b": (4096, 11008, 32)}[name.split("_")[2]]
    config = settings.build_model_config()
    assert (config.hidden_size, config.intermediate_size, config.num_hidden_layers) == size
    assert (settings.seed, settings.sampling.max_length, settings.sampling.top_k, settings.sampling.top_p) == (0, 512, 3, 1.0)
    assert {"context", "runner_config", "use_parallel", "metric", "model.model_config.use_past"} <= set(settings.ignored)


@pytest.mark.parametrize(
    ("name", "method", "combination", "skipped"),
    [
        ("predict_llama2_13b_rtn", "rtn", "A16W8", ("lm_head",)),
        ("predict_llama2_70b_smooth_quant", "smooth_quant", "A8W8", ("lm_head", "w2")),
        ("predict_llama2_13b_ptq", "ptq", "A8W8C8", ("lm_head", "w2")),
    ],
)
def test_original_file_says_its_quantization(shared_dir: Path, name: str, method: str, combination: str, skipped: tuple[str, ...]) -> None:
    quantization = read_settings(shared_dir / "data/mindformers_configs" / f"{name}.yaml").quantization
    assert quantization is not None
    assert (quantization.quant_method, quantization.combination, quantization.modules_to_not_convert) == (method, combination, skipped)


def test_original_file_with_adapters_warns(shared_dir: Path) -> None:
    (warning,) = read_settings(shared_dir / "data/mindformers_configs/predict_llama2_7b_ptuning2.yaml").warnings
    assert warning == "model.model_config.pet_config is ignored: adapters are not supported, so the base model runs alone"


# What a value means.


def test_file_that_says_little_leaves_the_rest_unsaid(tmp_path: Path) -> None:
    settings = read_text(tmp_path, "run_mode: predict\n")
    assert settings.model_values == {}
    assert settings.sampling.do_sample is None
    assert (settings.seq_length, settings.model_parallel, settings.compute_dtype, settings.seed) == (None, None, None, None)
    assert (settings.quantization, settings.vocab_file, settings.load_checkpoint, settings.tandem) == (None, None, None, TandemSettings())
    assert settings.ignored == ("run_mode",)


@pytest.mark.parametrize("null", ["None", "null", "~", "", "'None'"])
def test_none_in_any_spelling_says_nothing(tmp_path: Path, null: str) -> None:
    settings = read_text(tmp_path, f"seed: {null}\nload_checkpoint: {null}\nmodel: {null}\ntandem:\n  threads_per_rank: {null}\n")
    assert (settings.seed, settings.load_checkpoint, settings.model_values, settings.tandem.threads_per_rank) == (None, None, {}, None)


def test_empty_checkpoint_path_says_nothing(tmp_path: Path) -> None:
    assert read_text(tmp_path, "load_checkpoint: ''\n").load_checkpoint is None
    assert read_text(tmp_path, "load_checkpoint: a/b\n").load_checkpoint == "a/b"


def test_model_values_have_hugging_face_names(tmp_path: Path) -> None:
    settings = read_model(tmp_path, num_layers=3, num_heads=4, n_kv_heads=2, theta=500000, eos_token_id=[2, 7], seq_length=64)
    assert settings.model_values == {
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_theta": 500000.0,
        "eos_token_id": [2, 7],
    }
    assert settings.build_model_config().eos_token_ids == (2, 7)


def test_own_settings_are_read(tmp_path: Path) -> None:
    own: dict[str, Any] = {
        "threads_per_rank": 2,
        "collectives": "shm",
        "device": "cpu",
        "dtype": "float32",
        "temperature": 2,
        "max_batch_size": 4,
        "max_restarts": 0,
        "timeout_seconds": 1.5,
        "max_new_tokens": 9,
        "log_dir": "logs",
    }
    settings = read_raw(tmp_path, {"tandem": own})
    assert settings.tandem == TandemSettings(**own)
    assert isinstance(settings.sampling.temperature, float) and settings.sampling.temperature == 2.0


def test_sixteen_sequences_decode_together_unless_said(tmp_path: Path) -> None:
    assert read_text(tmp_path, "seed: 1\n").tandem.max_batch_size == 16


def test_blocks_are_read_from_where_mindformers_has_them(shared_dir: Path) -> None:
    settings = read_settings(shared_dir / "data/mindformers_configs/predict_llama2_7b.yaml")
    assert (settings.block_size, settings.num_blocks) == (16, 1024)
    assert not {"model.model_config.block_size", "model.model_config.num_blocks"} & set(settings.ignored)


def test_sampling_and_paths_are_read(tmp_path: Path) -> None:
    text = """
parallel_config: {model_parallel: 4}
model: {model_config: {max_decode_length: 30, do_sample: True, top_k: 0, top_p: 1, repetition_penalty: 1, compute_dtype: bfloat16}}
processor: {tokenizer: {vocab_file: t.model}}
"""
    settings = read_text(tmp_path, text)
    sampling = settings.sampling
    assert (sampling.max_length, sampling.do_sample, sampling.top_k, sampling.top_p, sampling.repetition_penalty) == (30, True, 0, 1.0, 1.0)
    assert isinstance(sampling.top_p, float)
    assert (settings.model_parallel, settings.compute_dtype, settings.vocab_file) == (4, "bfloat16", "t.model")


def test_ignored_keys_accept_anything_and_are_listed(tmp_path: Path) -> None:
    text = "context: {new_key: [1]}\ncallbacks: 3\nuse_parallel: Flase\nparallel_config: {data_parallel: many}\n"
    assert read_text(tmp_path, text).ignored == ("context", "callbacks", "use_parallel", "parallel_config.data_parallel")


@pytest.mark.parametrize(("stages", "num_warnings"), [(1, 0), (4, 1)])
def test_pipeline_stages_beyond_one_warn(tmp_path: Path, stages: int, num_warnings: int) -> None:
    assert len(read_raw(tmp_path, {"parallel_config": {"pipeline_stage": stages}}).warnings) == num_warnings


# The model's shape.


def test_defaults_are_those_of_mindformers(tmp_path: Path) -> None:
    config = read_text(tmp_path, "seed: 0\n").build_model_config()
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads) == (4096, 32, 32, 32)
    assert (config.vocab_size, config.intermediate_size, config.max_position_embeddings) == (32000, 11008, 2048)
    assert (config.rms_norm_eps, config.rope_theta, config.dtype, config.tie_word_embeddings) == (1e-5, 10000.0, "float16", False)
    assert (config.bos_token_id, config.eos_token_ids, config.pad_token_id) == (1, (2,), 0)


@pytest.mark.parametrize(
    ("keys", "width"),
    [
        ({}, 11008),
        ({"hidden_size": 5120, "num_heads": 40}, 13824),
        ({"hidden_size": 8192, "num_heads": 64, "ffn_dim_multiplier": 1.3}, 28672),
        ({"multiple_of": 4096}, 12288),
        ({"intermediate_size": 100, "ffn_dim_multiplier": 1.3}, 100),
    ],
)
def test_feed_forward_width_follows_mindformers(tmp_path: Path, keys: dict[str, Any], width: int) -> None:
    assert read_model(tmp_path, **keys).build_model_config().intermediate_size == width


def test_longest_sequence_is_the_position_table_or_else_the_sequence(tmp_path: Path) -> None:
    assert read_model(tmp_path, seq_length=64).build_model_config().max_position_embeddings == 64
    assert read_model(tmp_path, seq_length=64, max_position_embedding=128).build_model_config().max_position_embeddings == 128
    assert read_model(tmp_path, seq_length=128, max_position_embedding=64).build_model_config().max_position_embeddings == 128


def test_width_that_heads_do_not_divide_names_both(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"run\.yaml.* 100 .* 7"):
        read_model(tmp_path, hidden_size=100, num_heads=7).build_model_config()


# Against the checkpoint.


def test_file_agrees_with_its_own_config(tmp_path: Path) -> None:
    settings = read_model(tmp_path, hidden_size=64, num_layers=2, num_heads=4, n_kv_heads=2, vocab_size=96, ffn_dim_multiplier=1.3)
    settings.compare_model_config(settings.build_model_config(), "ckpt")


def test_every_disagreement_is_named_with_both_values(tmp_path: Path) -> None:
    config = read_model(tmp_path, hidden_size=576, num_layers=30, num_heads=9, vocab_size=49152).build_model_config()
    settings = read_model(tmp_path, hidden_size=4096, num_layers=32, num_heads=9, vocab_size=32000)
    with pytest.raises(ConfigError) as refused:
        settings.compare_model_config(config, "folder/ckpt")
    message = str(refused.value)
    assert "run.yaml" in message and "folder/ckpt" in message
    assert "hidden_size is 4096 against 576" in message
    assert "num_layers (num_hidden_layers) is 32 against 30" in message
    assert "vocab_size is 32000 against 49152" in message
    assert "num_heads" not in message


def test_feed_forward_width_is_compared_only_where_the_file_shapes_it(tmp_path: Path) -> None:
    config = replace(read_text(tmp_path, "seed: 0\n").build_model_config(), intermediate_size=1536)
    read_model(tmp_path, hidden_size=4096, multiple_of=256).compare_model_config(config, "ckpt")
    for keys, width in (({"intermediate_size": 11008}, 11008), ({"ffn_dim_multiplier": 1.3}, 14336)):
        with pytest.raises(ConfigError, match=f"intermediate_size is {width} against 1536"):
            read_model(tmp_path, **keys).compare_model_config(config, "ckpt")


def test_token_ids_and_sequence_length_are_not_compared(tmp_path: Path) -> None:
    config = read_text(tmp_path, "seed: 0\n").build_model_config()
    read_model(tmp_path, bos_token_id=7, eos_token_id=8, pad_token_id=9, seq_length=16).compare_model_config(config, "ckpt")


def test_constant_rounded_to_float32_is_the_same_constant(tmp_path: Path) -> None:
    config = replace(read_text(tmp_path, "seed: 0\n").build_model_config(), rms_norm_eps=9.999999747378752e-06)
    read_model(tmp_path, rms_norm_eps=1e-5).compare_model_config(config, "ckpt")
    with pytest.raises(ConfigError, match=r"rms_norm_eps is 1e-06 against 9\.99"):
        read_model(tmp_path, rms_norm_eps=1e-6).compare_model_config(config, "ckpt")


def test_settings_that_newer_files_of_mindformers_have(tmp_path: Path) -> None:
    text = (
        "moe_config: {expert_num: 1, capacity_factor: 1.05}\nuse_legacy: False\npretrained_model_dir: hf\nonly_save_strategy: False\n"
        "tandem: {fused_order: 1.4}\n"
        "model: {model_config: {temperature: 0.6, eos_token_id: [2, 7], max_position_embeddings: 77, moe_config: None}}\n"
    )
    settings = read_text(tmp_path, text)
    assert settings.load_checkpoint == settings.pretrained_model_dir == "hf"
    assert settings.tandem.fused_order == "1.4"
    assert (settings.sampling.temperature, settings.max_position_embedding) == (0.6, 77)
    assert settings.model_values == {"eos_token_id": [2, 7]}
    assert read_text(tmp_path, text.replace("1.4}", "'1.3', temperature: 0.9}")).sampling.temperature == 0.9
    assert read_text(tmp_path, text + "load_checkpoint: other\n").load_checkpoint == "other"
    assert read_text(tmp_path, "tandem: {fused_order: auto}").tandem.fused_order == "auto"


def test_a_default_of_algorithm_args_is_no_value(tmp_path: Path) -> None:
    section = "model: {model_config: {quantization_config: {quant_method: rtn, weight_dtype: int8, algorithm_args: {alpha: None}}}}"
    quantization = read_text(tmp_path, section).quantization
    assert quantization is not None
    assert quantization.algorithm_args == {}


def test_llama3_stretching_is_read_and_compared(tmp_path: Path) -> None:
    factors = "{factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_max_position_embeddings: 8192}"
    text = f"model: {{model_config: {{hidden_size: 64, num_heads: 4, extend_method: LLAMA3, scaling_factor: {factors}}}}}"
    settings = read_text(tmp_path, text)
    scaling = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)
    config = settings.build_model_config()
    assert config.rope_scaling == scaling
    settings.compare_model_config(config, "here")
    for other, words in ((None, "none"), (replace(scaling, factor=32.0), "llama3 factor 32, low_freq_factor 1")):
        with pytest.raises(ConfigError, match=rf"extend_method \(rope_scaling\) is llama3 factor 8, .* against {words}"):
            settings.compare_model_config(replace(config, rope_scaling=other), "here")


YARN = {"factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 32.0, "beta_slow": 1.0}


def compute_as_mindformers(method: str, factor: Any, theta: float, width: int) -> tuple[npt.NDArray[np.float64], float]:
    """Radians per position of each rotary pair, and the factor of cosine and sine, as FreqsMgr of MindFormers computes them."""
    theta = theta * factor if method == "NTK" else theta
    base = 1.0 / theta ** (np.arange(0, width, 2) / width)
    if method in ("PI", "linear"):
        return base / (factor if method == "PI" else factor["factor"]), 1.0
    if method != "YARN":
        return base, 1.0
    ends = [width * math.log(64 / (turns * 2 * math.pi)) / (2 * math.log(theta)) for turns in (32.0, 1.0)]
    low, high = max(math.floor(ends[0]), 0), min(math.ceil(ends[1]), width - 1)
    ramp = np.clip((np.arange(width // 2) - low) / max(high - low, 0.001), 0, 1)
    scale, both = factor["factor"], (factor["mscale"], factor["mscale_all_dim"])
    numerator, denominator = (0.1 * one * math.log(scale) + 1 for one in both)
    return base / scale * ramp + base * (1 - ramp), numerator / denominator


@pytest.mark.parametrize(
    ("method", "factor"),
    [
        ("PI", 4),
        ("PI", 2.5),
        ("PI", 1),
        ("NTK", 8.0),
        ("NTK", 1.0),
        ("linear", {"factor": 2.0}),
        *(("YARN", {**YARN, "mscale": one, "mscale_all_dim": other}) for one, other in ((1.0, 1.0), (1.0, 0.0), (0.0, 0.0), (0.707, 1.0))),
    ],
)
def test_stretched_positions_are_those_of_mindformers(tmp_path: Path, method: str, factor: Any) -> None:
    sizes = {"hidden_size": 128, "num_heads": 2, "seq_length": 256, "theta": 5000.0}
    config = read_model(tmp_path, extend_method=method, scaling_factor=factor, **sizes).build_model_config()
    frequencies, scale = compute_as_mindformers(method, factor, 5000.0, 64)
    np.testing.assert_allclose(compute_frequencies(config.rope_theta, 64, config.rope_scaling), frequencies, rtol=2e-6)
    assert math.isclose(attention_factor(config.rope_scaling), scale, rel_tol=1e-12)


def test_a_scaling_that_differs_from_the_checkpoint_is_named(tmp_path: Path) -> None:
    config = read_model(tmp_path).build_model_config()
    for method, factor, words in (
        ("PI", 4, r"extend_method \(rope_scaling\) is linear factor 4 against none"),
        ("YARN", {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}, r"is yarn factor 4, original_max_position_embeddings 64, .* against none"),
        ("NTK", 4, r"theta \(rope_theta\) is 40000\.0 against 10000\.0"),
    ):
        with pytest.raises(ConfigError, match=words):
            read_model(tmp_path, extend_method=method, scaling_factor=factor).compare_model_config(config, "here")


def test_begin_and_end_tokens_of_the_tokenizer_are_read(tmp_path: Path) -> None:
    """The YAML files of Yi ask for none."""
    settings = read_text(tmp_path, "processor: {tokenizer: {add_bos_token: False, add_eos_token: True}}")
    assert (settings.add_bos_token, settings.add_eos_token) == (False, True)
    settings = read_text(tmp_path, "processor: {tokenizer: {add_bos_token: None, type: LlamaTokenizer}}")
    assert (settings.add_bos_token, settings.add_eos_token, settings.chat_template) == (None, None, None)
    assert read_text(tmp_path, "processor: {tokenizer: {chat_template: '{{ x }}'}}").chat_template == "{{ x }}"


def test_the_only_yaml_next_to_a_checkpoint_is_used(tmp_path: Path) -> None:
    (tmp_path / "x.ckpt").touch()
    (tmp_path / "recipe.yaml").write_text("seed: 2")  # of another program: it has no model
    assert open_settings(None, tmp_path).source == "no config"
    (tmp_path / "a.yaml").write_text("seed: 3\nmodel: {model_config: {num_layers: 2}}")
    for checkpoint in (tmp_path, tmp_path / "x.ckpt"):
        assert (open_settings(None, checkpoint).seed, open_settings(None, checkpoint).source) == (3, str(tmp_path / "a.yaml"))
    (tmp_path / "b.yml").write_text("seed: 4\nmodel: {model_config: {}}")
    assert open_settings(tmp_path / "b.yml", tmp_path).seed == 4
    for checkpoint in (tmp_path, tmp_path / "x.ckpt"):
        with pytest.raises(ConfigError, match=r"holds 2 MindFormers YAML files \(a\.yaml, b\.yml\): choose with --config"):
            open_settings(None, checkpoint)


def test_the_yaml_of_a_rank_folder_is_in_the_folder_around_it(tmp_path: Path) -> None:
    file = tmp_path / "model" / "rank_0" / "x.ckpt"
    file.parent.mkdir(parents=True)
    file.touch()
    (tmp_path / "model" / "a.yaml").write_text("seed: 3\nmodel: {model_config: {num_layers: 2}}")
    for checkpoint in (file, file.parent, file.parent.parent):
        assert open_settings(None, checkpoint).seed == 3
    file.parent.rename(tmp_path / "model" / "other")
    assert open_settings(None, tmp_path / "model" / "other").source == "no config"


def test_of_several_yaml_files_the_one_that_predicts_is_used(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").touch()
    for name, mode in (("a.yaml", "finetune"), ("b.yaml", "predict"), ("c.yaml", "eval")):
        (tmp_path / name).write_text(f"run_mode: {mode}\nmodel: {{model_config: {{num_layers: 2}}}}")
    for checkpoint in (tmp_path, tmp_path / "x.safetensors"):
        assert open_settings(None, checkpoint).source == str(tmp_path / "b.yaml")
    (tmp_path / "b.yaml").unlink()
    with pytest.raises(ConfigError, match=r"holds 2 MindFormers YAML files \(a\.yaml, c\.yaml\)"):
        open_settings(None, tmp_path)


def test_a_yaml_next_to_a_config_json_is_for_the_folder_and_not_for_a_file_in_it(tmp_path: Path) -> None:
    for name in ("x.ckpt", "model.gguf"):
        (tmp_path / name).touch()
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "a.yaml").write_text("seed: 3\nmodel: {model_config: {num_layers: 2}}")
    assert open_settings(None, tmp_path).source == str(tmp_path / "a.yaml")
    for name in ("x.ckpt", "model.gguf"):
        assert open_settings(None, tmp_path / name).source == "no config"
