"""Every key of the settings is read, required, ignored with a note, harmless, or listed as unknown."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig as TransformersConfig

from model.spec.config import build_config
from model.spec.config_keys import CONFIG_KEYS
from model.spec.key_table import KeyTable
from model.spec.linear_scheme import LinearScheme
from model.spec.quantization_keys import (
    ARGUMENT_KEYS,
    AUTO_ROUND_KEYS,
    AWQ_KEYS,
    COMPRESSED_KEYS,
    FLOAT8_KEYS,
    GPTQ_KEYS,
    GROUP_KEYS,
    MODELOPT_KEYS,
)
from model.spec.scheme import Scheme, describe_scheme_keys, read_scheme, write_scheme
from parallel.errors import ConfigError

SIZES: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 8,
}
TABLES = (CONFIG_KEYS, COMPRESSED_KEYS, GROUP_KEYS, ARGUMENT_KEYS, GPTQ_KEYS, AWQ_KEYS, AUTO_ROUND_KEYS, FLOAT8_KEYS, MODELOPT_KEYS)
VALUES = st.one_of(st.booleans(), st.integers(-3, 3), st.floats(0, 2), st.text(max_size=5), st.lists(st.integers(), max_size=2), st.none())


@settings(max_examples=200, deadline=None)
@given(extra=st.dictionaries(st.text(min_size=1, max_size=30), VALUES, max_size=30))
def test_unknown_keys_change_nothing_and_are_all_told_in_one_line(extra: dict[str, Any]) -> None:
    unknown = {key: value for key, value in extra.items() if not CONFIG_KEYS.knows(key)}
    assert build_config(SIZES | unknown) == build_config(SIZES)
    lines = CONFIG_KEYS.describe(SIZES | unknown, "config.json")
    assert len(lines) == bool(unknown)
    if lines:
        assert lines[0].startswith("config.json: unknown keys, not read: ")
        assert lines[0].isprintable() and lines[0].count(", ") >= min(len(unknown), 12) - 1


@settings(max_examples=200, deadline=None)
@given(key=st.sampled_from(sorted(CONFIG_KEYS.ignored)), value=VALUES)
def test_an_ignored_key_changes_nothing_and_is_told_unless_it_is_neutral(key: str, value: Any) -> None:
    assert build_config(SIZES | {key: value}) == build_config(SIZES)
    lines = CONFIG_KEYS.describe(SIZES | {key: value}, "config.json")
    assert len(lines) <= 1 and all(f"{key} is " in line and "ignored, as in transformers" in line for line in lines)
    if value is None:
        assert not lines


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_required_key_has_one_of_its_values_or_is_refused_with_both(table: KeyTable, data: st.DataObject) -> None:
    if not table.fixed:
        return
    key = data.draw(st.sampled_from(sorted(table.fixed)))
    value = data.draw(st.one_of(VALUES, st.sampled_from([*table.fixed[key], None])))
    allowed = [one for one in table.fixed[key] if one == value and isinstance(one, bool) == isinstance(value, bool)]
    is_empty = not table.fixed[key] and value == []
    is_list = isinstance(value, list)
    if value is None or allowed or is_empty:
        table.check({key: value}, "x")
    elif not is_list and not isinstance(value, bool | int | float):
        with pytest.raises(ConfigError, match=rf"^x: {key} is .*, but only .* is supported$"):
            table.check({key: value}, "x")


def test_no_key_of_transformers_own_config_is_unknown() -> None:
    raw = TransformersConfig(**{key: value for key, value in SIZES.items() if key != "model_type"}).to_dict()
    assert CONFIG_KEYS.describe(raw, "config.json") == []
    build_config(raw)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures names 'LlamaForSequenceClassification', but only"),
        (
            {"model_type": "deepseek_v3"},
            r"model_type is 'deepseek_v3' \(a mixture of experts\), but only .*'llama', .*'qwen2', .* are supported",
        ),
        ({"model_type": "llava"}, r"\(a vision-language model\)"),
        ({"model_type": "unheard-of"}, "model_type is 'unheard-of', but only .*'llama', "),
        ({"attention_bias": "yes"}, "attention_bias is 'yes', but true or false is needed"),
        ({"mlp_bias": 1}, "mlp_bias is 1, but true or false is needed"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder is True, but only False is supported"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', but only 'silu' or 'swish' is supported"),
    ],
)
def test_another_model_is_refused_by_what_it_is(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=rf"config\.json: .*{words}"):
        build_config(SIZES | changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"transform_config": {"config_groups": {"u": 1}}}, "transform_config is .*, but only null is supported"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config of format 'sparse-24-bitmask' is not supported"),
        ({"quantization_status": "frozen"}, "quantization_status is 'frozen', but only 'compressed' is supported"),
        ({"quant_method": "hqq"}, r"quant_method 'hqq' is not supported; supported: compressed-tensors \(int8, int4, fp8\), gptq, awq"),
    ],
)
def test_a_compressed_tensors_key_that_changes_the_arithmetic_is_refused(changes: dict[str, Any], words: str) -> None:
    section = write_scheme(Scheme(LinearScheme(bits=4, group_size=32)))
    with pytest.raises(ConfigError, match=words):
        read_scheme({"quantization_config": section | changes})


def test_unknown_keys_of_compressed_tensors_are_told_by_section() -> None:
    section = write_scheme(Scheme(LinearScheme(bits=4, group_size=32)))
    assert describe_scheme_keys({"quantization_config": section}) == []
    section["new_top"] = section["config_groups"]["group_0"]["new_group"] = section["config_groups"]["group_0"]["weights"]["new_arg"] = 1
    lines = describe_scheme_keys({"quantization_config": section})
    assert [line.rsplit(" ", 1)[1] for line in lines] == ["new_top", "new_group", "new_arg"]
