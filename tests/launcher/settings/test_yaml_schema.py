"""A MindFormers YAML that cannot be used: what is refused, and with which words."""

from pathlib import Path
from typing import Any

import pytest

from launcher.settings.yaml_schema import SCHEMA, Ignored, Schema, Value, check_keys
from launcher.settings.yaml_settings import Settings, read_settings
from parallel.errors import ConfigError


def read_text(tmp_path: Path, text: str) -> Settings:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return read_settings(path)


def refuse(tmp_path: Path, text: str) -> str:
    with pytest.raises(ConfigError) as refused:
        read_text(tmp_path, text)
    message = str(refused.value)
    assert str(tmp_path / "run.yaml") in message
    return message


@pytest.mark.parametrize(
    ("text", "path", "nearest"),
    [
        ("paralel_config: {}", "paralel_config", "parallel_config"),
        ("parallel_config: {modle_parallel: 2}", "parallel_config.modle_parallel", "parallel_config.model_parallel"),
        ("model: {model_cfg: {}}", "model.model_cfg", "model.model_config"),
        ("model: {model_config: {hiden_size: 2}}", "model.model_config.hiden_size", "model.model_config.hidden_size"),
        (
            "model: {model_config: {quantization_config: {quant_metod: rtn}}}",
            "model.model_config.quantization_config.quant_metod",
            "model.model_config.quantization_config.quant_method",
        ),
        ("model: {arch: {typ: x}}", "model.arch.typ", "model.arch.type"),
        ("processor: {tokenizer: {vocabfile: x}}", "processor.tokenizer.vocabfile", "processor.tokenizer.vocab_file"),
        ("tandem: {threads: 2}", "tandem.threads", "tandem.threads_per_rank"),
        ("model_parallel: 2", "model_parallel", "parallel_config.model_parallel"),
    ],
)
def test_unknown_key_suggests_the_nearest(tmp_path: Path, text: str, path: str, nearest: str) -> None:
    assert f"{path} is not a known key; did you mean {nearest}?" in refuse(tmp_path, text)


def test_unknown_key_that_resembles_nothing_is_refused_too(tmp_path: Path) -> None:
    assert "tandem.qqqqqq is not a known key; no known key is similar" in refuse(tmp_path, "tandem: {qqqqqq: 1}")
    assert "17 is not a known key" in refuse(tmp_path, "17: x")
    # Keys that share a word are no typos of each other, and nothing of another section is guessed.
    assert "hidden_act is not a known key; no known key is similar" in refuse(tmp_path, "model: {model_config: {hidden_act: silu}}")
    assert "num_shards is not a known key; no known key is similar" in refuse(tmp_path, "model: {model_config: {num_shards: 2}}")
    assert "hidden_sizes is not a known key; no known key is similar" in refuse(tmp_path, "hidden_sizes: 2")
    assert "trust_remote is not a known key; did you mean trust_remote_code?" in refuse(tmp_path, "trust_remote: True")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("seed: -1", "seed is -1 (int), but a whole number of at least 0 is needed"),
        ("seed: 1.5", "seed is 1.5 (float), but a whole number"),
        ("seed: True", "seed is True (bool), but a whole number"),
        ("load_checkpoint: 3", "load_checkpoint is 3 (int), but text is needed"),
        ("parallel_config: 3", "parallel_config is 3, but a mapping is needed"),
        ("parallel_config: {model_parallel: 0}", "parallel_config.model_parallel is 0 (int), but a whole number of at least 1 is needed"),
        ("parallel_config: {model_parallel: two}", "parallel_config.model_parallel is 'two' (str), but a whole number"),
        ("model: {model_config: {num_layers: '32'}}", "model.model_config.num_layers is '32' (str), but a whole number"),
        ("model: {model_config: {top_p: 1.5}}", "top_p is 1.5 (float), but a number above 0 and of at most 1 is needed"),
        ("model: {model_config: {top_p: 0}}", "top_p is 0 (int), but a number above 0"),
        ("model: {model_config: {repetition_penalty: .nan}}", "repetition_penalty is nan (float), but a number above 0"),
        ("model: {model_config: {repetition_penalty: .inf}}", "repetition_penalty is inf (float), but a number above 0"),
        ("model: {model_config: {do_sample: 1}}", "do_sample is 1 (int), but true or false is needed"),
        ("model: {model_config: {eos_token_id: [2, x]}}", "eos_token_id is [2, 'x'] (list), but a whole number or a list"),
        ("model: {model_config: {eos_token_id: [2, -1]}}", "eos_token_id is [2, -1] (list), but"),
        ("model: {model_config: {compute_dtype: int8}}", "compute_dtype is 'int8' (str), but 'float32' or 'bfloat16' or 'float16' or None"),
        ("model: {model_config: {rms_norm_eps: 1e-5}}", "write a number with a point, as in 1.0e-5"),
        (
            "model: {model_config: {type: GPT2Config}}",
            "model.model_config.type is 'GPT2Config' (str), but 'LlamaConfig' or 'Qwen2Config' or ",
        ),
        (
            "model: {model_config: {extend_method: DYNAMIC_NTK}}",
            "extend_method is 'DYNAMIC_NTK' (str), but 'LLAMA3' or 'YARN' or 'linear' or 'PI' or 'NTK' or None is needed; other ways of",
        ),
        ("model: {model_config: {extend_method: PI, scaling_factor: {factor: 2.0}}}", "but extend_method PI needs a number above 0"),
        (
            "model: {model_config: {extend_method: NTK, scaling_factor: 0}}",
            "scaling_factor is 0, but extend_method NTK needs a number above",
        ),
        ("model: {model_config: {extend_method: linear, scaling_factor: 2.0}}", "but extend_method linear needs a mapping of factor"),
        (
            "model: {model_config: {extend_method: linear, scaling_factor: {factor: -1}}}",
            "factor of rope_scaling is -1, but a number above 0",
        ),
        ("model: {model_config: {extend_method: YARN, scaling_factor: {factor: 2.0}}}", "scaling_factor lacks original_max_position_emb"),
        (
            "model: {model_config: {extend_method: YARN, scaling_factor: {truncate: True}}}",
            "scaling_factor.truncate is not a known key; extend_method YARN has factor",
        ),
        (
            "model: {model_config: {extend_method: LLAMA3}}",
            "scaling_factor is None, but extend_method LLAMA3 needs a mapping of factor, low_",
        ),
        ("model: {model_config: {extend_method: LLAMA3, scaling_factor: 8.0}}", "scaling_factor is 8.0, but extend_method LLAMA3 needs"),
        ("model: {model_config: {extend_method: LLAMA3, scaling_factor: {factor: 8}}}", "scaling_factor: rope_scaling lacks low_freq_fac"),
        ("model: {model_config: {extend_method: LLAMA3, scaling_factor: {fact: 8}}}", "scaling_factor.fact is not a known key"),
        ("run_mode: finetune", "run_mode is 'finetune' (str), but 'predict' or None is needed"),
        ("run_mode: train", "run_mode is 'train' (str), but 'predict'"),
        ("run_mode: eval", "run_mode is 'eval' (str), but 'predict'"),
        (
            "only_save_strategy: True",
            "only_save_strategy is True (bool), but False or None is needed; MindFormers would write strategy files",
        ),
        (
            "moe_config: {expert_num: 8}",
            "moe_config is {'expert_num': 8} (dict), but a dense model (expert_num 1) is needed; mixtures of exp",
        ),
        ("moe_config: {expert_num: 1, shared_expert_num: 2}", "but a dense model (expert_num 1) is needed"),
        ("model: {model_config: {moe_config: {expert_num: 8}}}", "model.model_config.moe_config is {'expert_num': 8}"),
        (
            "model: {model_config: {type: DeepseekV3Config, kv_lora_rank: 8}}",
            "model.model_config.type is 'DeepseekV3Config', a mixture of exp",
        ),
        ("model: {arch: {type: InternVLChatModel}}", "model.arch.type is 'InternVLChatModel', a model of images and text, which is not"),
        ("model: {model_config: {type: X, vision_model: {arch: {}}}}", "model.model_config.vision_model belongs to a model of images and"),
        ("model: {model_config: {type: WhisperConfig}}", "'WhisperConfig', a speech model, which is not supported"),
        ("model: {model_config: {type: ChatGLM2Config}}", "'ChatGLM2Config' (str), but 'LlamaConfig' or 'Qwen"),
        (
            "model: {model_config: {type: LlamaConfig}, arch: {type: Baichuan7BV2ForCausalLM, auto_register: x}}",
            "model.arch.type is 'Baichuan7BV2ForCausalLM' (str), but 'LlamaForCausalLM' or",
        ),
        ("model: {model_config: {moe_config: 8}}", "model.model_config.moe_config is 8 (int), but a dense model"),
        ("tandem: {fused_order: 1.5}", "tandem.fused_order is 1.5 (float), but 'auto' or '1.3' or '1.4'"),
        *(
            (f"model: {{model_config: {{quantization_config: {{quant_method: ptq, algorithm_args: {args}}}}}}}", words)
            for args, words in [
                ("[1]", "algorithm_args is [1], but a mapping is needed"),
                ("x", "algorithm_args is 'x', but a mapping is needed"),
                ("{alpha: x}", "algorithm_args.alpha is 'x' (str), but a number of at least 0 and of at most 1 is needed"),
                ("{alpha: [0.5]}", "algorithm_args.alpha is [0.5] (list), but a number"),
                ("{alpha: 1.5}", "algorithm_args.alpha is 1.5 (float), but a number of at least 0 and of at most 1 is needed"),
                ("{alpha: True}", "algorithm_args.alpha is True (bool), but a number"),
                (
                    "{alfa: 0.5}",
                    "algorithm_args.alfa is not a known key; did you mean model.model_config.quantization_config.algorithm_args.alpha?",
                ),
            ]
        ),
        ("model: {model_config: {attn_proj_has_bias: True}}", "biases of the output projection are not supported"),
        ("base_config: other.yaml", "write its keys into this one"),
        ("tandem: {collectives: mpi}", "collectives is 'mpi' (str), but 'auto' or 'shm' or 'gloo' or 'nccl' or None is needed"),
        ("tandem: {timeout_seconds: 0}", "tandem.timeout_seconds is 0 (int), but a number above 0 is needed"),
        ("tandem: [1]", "tandem is [1], but a mapping is needed"),
    ],
)
def test_value_that_cannot_be_used_is_named_with_what_is_needed(tmp_path: Path, text: str, words: str) -> None:
    assert words in refuse(tmp_path, text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is empty"),
        ("# only a comment\n", "is empty"),
        ("- 1\n- 2\n", "holds a list, but a mapping of keys is needed"),
        ("just words", "holds a str"),
        ("a: [1", "is not YAML"),
        ("seed: 2024-13-45", "is not YAML"),
        ("[" * 5000, "is not YAML"),
        ("seed: 1\nseed: 2\n", "the key 'seed' occurs twice"),
        ("model: {model_config: {top_k: 1, top_k: 2}}", "the key 'top_k' occurs twice"),
    ],
)
def test_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str, words: str) -> None:
    assert words in refuse(tmp_path, text)


def test_merged_yaml_keys_do_not_stand_twice(tmp_path: Path) -> None:
    text = "trainer: &a {type: x, name: y}\ncontext: &b {<<: *a, type: z}\nmetric: {<<: *b, type: w}\nseed: 3\n"
    assert read_text(tmp_path, text).seed == 3


def test_missing_file_and_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml does not exist"):
        read_settings(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_settings(tmp_path)


def test_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(ConfigError, match="is not YAML"):
        read_settings(tmp_path / "run.yaml")


def test_every_ignored_key_is_accepted_with_any_content() -> None:
    def fill(schema: Schema) -> dict[str, Any]:
        filled: dict[str, Any] = {}
        for key, node in schema.items():
            if isinstance(node, Ignored) and node.only is None:
                filled[key] = {"anything": [1]}
            elif not isinstance(node, (Ignored, Value)):
                filled[key] = fill(node)
        return filled

    names = check_keys(fill(SCHEMA))
    assert len(names) == len(set(names)) > 80
