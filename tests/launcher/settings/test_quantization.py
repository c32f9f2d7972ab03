"""The quantization_config section: which words there are, and which of them go together."""

from dataclasses import replace
from typing import Any

import pytest

from launcher.settings.quantization import QuantizationSettings, build_quantization
from launcher.settings.yaml_schema import check_keys
from model.spec.config import build_config
from model.spec.linear_scheme import LinearScheme
from model.spec.scheme import Scheme, group_linears
from parallel.errors import ConfigError


def read_quantization(**keys: Any) -> QuantizationSettings:
    check_keys({"model": {"model_config": {"quantization_config": keys}}})
    quantization = build_quantization(keys)
    assert quantization is not None
    return quantization


INT8, SMOOTH = "int8", "smooth"


@pytest.mark.parametrize(
    ("method", "weights", "activations", "cache", "outliers", "combination"),
    [
        ("rtn", INT8, None, None, None, "A16W8"),
        ("rtn", None, None, INT8, None, "C8"),
        ("rtn", INT8, None, INT8, None, "A16W8C8"),
        ("smooth_quant", INT8, INT8, None, SMOOTH, "A8W8"),
        ("ptq", INT8, None, None, SMOOTH, "A16W8"),
        ("ptq", INT8, INT8, INT8, SMOOTH, "A8W8C8"),
        ("ptq", INT8, INT8, None, None, "A8W8"),
        ("ptq", None, None, INT8, None, "C8"),
    ],
)
def test_allowed_combination_is_accepted(
    method: str, weights: str | None, activations: str | None, cache: str | None, outliers: str | None, combination: str
) -> None:
    quantization = read_quantization(
        quant_method=method,
        weight_dtype=weights,
        activation_dtype=activations,
        kvcache_dtype=cache,
        outliers_suppression=outliers,
        algorithm_args={"alpha": 0.5},
    )
    assert (quantization.combination, quantization.algorithm_args) == (combination, {"alpha": 0.5})


@pytest.mark.parametrize(
    ("method", "weights", "activations", "cache", "outliers", "words"),
    [
        ("rtn", INT8, INT8, None, None, ["'rtn' for A8W8", "A16W8 or C8 or A16W8C8"]),
        ("rtn", INT8, None, None, SMOOTH, ["outliers_suppression 'smooth'", "with outliers_suppression None"]),
        ("rtn", None, None, None, None, ["'rtn' for A16W16"]),
        ("smooth_quant", INT8, INT8, None, None, ["outliers_suppression None", "A8W8 with outliers_suppression 'smooth'"]),
        ("smooth_quant", INT8, None, None, SMOOTH, ["'smooth_quant' for A16W8", "does A8W8"]),
        ("smooth_quant", INT8, INT8, INT8, SMOOTH, ["'smooth_quant' for A8W8C8"]),
        ("ptq", None, INT8, None, None, ["'ptq' for A8W16", "A16W8 or A8W8 or C8"]),
    ],
)
def test_combination_that_the_method_lacks_says_what_it_does(
    method: str, weights: str | None, activations: str | None, cache: str | None, outliers: str | None, words: list[str]
) -> None:
    keys = {"weight_dtype": weights, "activation_dtype": activations, "kvcache_dtype": cache, "outliers_suppression": outliers}
    with pytest.raises(ConfigError) as refused:
        read_quantization(quant_method=method, **keys)
    for word in words:
        assert word in str(refused.value)


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("quant_method", "awq", "'ptq' or 'rtn' or 'smooth_quant'"),
        ("weight_dtype", "int4", "None or 'int8'"),
        ("activation_dtype", "float16", "None or 'int8'"),
        ("kvcache_dtype", "int9", "None or 'int8'"),
        ("outliers_suppression", "awq", "None or 'smooth'"),
    ],
)
def test_unknown_quantization_word_lists_the_known_ones(key: str, value: str, allowed: str) -> None:
    with pytest.raises(ConfigError) as refused:
        read_quantization(**{"quant_method": "rtn", "weight_dtype": INT8, key: value})
    assert f"model.model_config.quantization_config.{key} is {value!r}, but {allowed} is needed" in str(refused.value)


def test_quantization_without_a_method_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"lacks quant_method; 'ptq' or 'rtn' or 'smooth_quant' is needed"):
        read_quantization(weight_dtype=INT8)


def test_modules_to_skip_must_be_words() -> None:
    with pytest.raises(ConfigError, match=r"modules_to_not_convert is \[3\] \(list\), but a list \(every item: text\) is needed"):
        read_quantization(quant_method="rtn", weight_dtype=INT8, modules_to_not_convert=[3])


def test_linears_that_stay_float_are_compared_with_the_checkpoint() -> None:
    config = build_config({"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 40})
    linear = LinearScheme(packed=False)
    downs = tuple(f"model.layers.{layer}.mlp.down_proj" for layer in range(2))

    def check(words: tuple[str, ...], *ignore: str, tied: bool = False) -> None:
        settings = QuantizationSettings(quant_method="rtn", weight_dtype="int8", modules_to_not_convert=words)
        settings.check_scheme(Scheme(linear, ignore), replace(config, tie_word_embeddings=tied), "x.ckpt", "x.yaml")

    check((), "lm_head")
    check(("lm_head",), "lm_head")
    check(("lm_head", "w2"), "lm_head", *downs)
    check(("lm_head", "feed_forward"), "lm_head", "re:.*mlp")
    check(("w_gate_hidden", "lm_head"), "lm_head", "re:.*(gate|up)_proj")
    check(("w2",), *downs, tied=True)
    with pytest.raises(
        ConfigError,
        match=r"modules_to_not_convert is \['lm_head', 'w2'\], but x\.ckpt holds int8 weights of .*layers\.0\.mlp\.down_proj \(2 of 15",
    ):
        check(("lm_head", "w2"), "lm_head")
    with pytest.raises(ConfigError, match=r"is \['lm_head'\], but x\.ckpt holds float weights of .*down_proj \(2 of 15 linears differ\)"):
        check(("lm_head",), "lm_head", *downs)
    with pytest.raises(ConfigError, match=r"is \['w2'\], but x\.ckpt holds float weights of lm_head \(1 of 15"):
        check(("w2",), "lm_head", *downs)


def test_ptq_may_fall_back_to_a16w8_for_single_linears() -> None:
    """Golden Stick's `fallback_blacklist`."""
    config = build_config({"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 32})
    static, plain = LinearScheme(packed=False, activation="tensor"), LinearScheme(packed=False)
    mixed = group_linears({"model.layers.0.self_attn.q_proj": static, "model.layers.0.mlp.down_proj": plain}, ())
    words: dict[str, Any] = {"weight_dtype": "int8", "activation_dtype": "int8", "outliers_suppression": "smooth"}
    QuantizationSettings(quant_method="ptq", **words).check_scheme(mixed, config, "x.ckpt", "x.yaml")
    with pytest.raises(ConfigError, match=r"requests smooth_quant \(A8W8\), but x\.ckpt holds A16W8 and A8W8"):
        QuantizationSettings(quant_method="smooth_quant", **words).check_scheme(mixed, config, "x.ckpt", "x.yaml")
    with pytest.raises(ConfigError, match=r"requests ptq \(A8W8\), but x\.ckpt holds A16W8 \(rtn-a16w8\)"):
        QuantizationSettings(quant_method="ptq", **words).check_scheme(Scheme(plain), config, "x.ckpt", "x.yaml")
