"""From Golden Stick's words and a YAML's section to a recipe: presets, who says which layers stay float, and what is refused."""

from dataclasses import replace
from typing import Any

import pytest

from launcher.commands.quantize import describe_report
from launcher.settings.approaches import APPROACHES, QuantizeOptions, plan_recipe
from launcher.settings.quantization import QuantizationSettings
from model.quantization.recipe import Recipe
from model.spec.config import build_config
from model.spec.linear_scheme import LinearScheme
from parallel.errors import ConfigError

LLAMA_7B = build_config(
    {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 2,
        "num_attention_heads": 32,
        "vocab_size": 32000,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096,
    }
)
RTN = QuantizationSettings(quant_method="rtn", weight_dtype="int8", modules_to_not_convert=("lm_head", "w2"))
PTQ = QuantizationSettings(
    quant_method="ptq",
    weight_dtype="int8",
    activation_dtype="int8",
    outliers_suppression="smooth",
    modules_to_not_convert=("wo",),
    algorithm_args={"alpha": 0.7},
)
SMOOTH = QuantizationSettings(
    quant_method="smooth_quant", weight_dtype="int8", activation_dtype="int8", outliers_suppression="smooth", algorithm_args={"alpha": 0.8}
)
WEIGHTS, STATIC = LinearScheme(), LinearScheme(packed=False, activation="tensor", activation_symmetric=False)


def plan(approach: str, yaml: QuantizationSettings | None = None, **said: Any) -> Recipe:
    return plan_recipe(QuantizeOptions(approach=approach, **said), APPROACHES[approach], yaml)


def test_presets_are_those_of_golden_stick() -> None:
    rtn, cache, smooth = plan("rtn-a16w8"), plan("rtn-c8"), plan("smooth_quant")
    assert rtn == Recipe(approach="rtn-a16w8", linear=WEIGHTS, not_converted=("lm_head",))
    assert cache == Recipe(approach="rtn-c8", linear=None, kv_cache="channel", not_converted=())
    assert smooth == Recipe(approach="smooth_quant", linear=STATIC, smooth=True, alpha=0.5, not_converted=("lm_head", "w2"))
    ptq = plan("ptq", weight_dtype="int8")
    assert ptq == Recipe(approach="ptq", linear=WEIGHTS, half_scales=True, not_converted=())


def test_smooth_quant_leaves_the_head_and_every_down_projection_float() -> None:
    scheme = plan("smooth_quant").build_scheme(LLAMA_7B)
    floats = [name for name in scheme.ignore if not name.startswith("re:")]
    assert not scheme.is_quantized("lm_head") and not scheme.is_quantized("model.layers.1.mlp.down_proj"), floats
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj"):
        assert scheme.is_quantized(f"model.layers.1.{name}")


@pytest.mark.parametrize(
    ("approach", "name"),
    [
        ("rtn-a16w8", "rtn-a16w8"),
        ("rtn-c8", "c8"),
        ("smooth_quant", "a8w8-static-smooth"),
        ("gptq", "a16w4-g128"),
        ("awq", "a16w4-g128"),
        ("rtn-a16w4", "a16w4-g128"),
        ("a8w8", "a8w8-dynamic"),
    ],
)
def test_every_approach_alone_fits_llama_2(approach: str, name: str) -> None:
    assert plan(approach).build_scheme(LLAMA_7B).name == name


def test_all_approaches_are_known_words() -> None:
    assert tuple(APPROACHES) == ("rtn-a16w8", "rtn-c8", "smooth_quant", "ptq", "gptq", "awq", "rtn-a16w4", "a8w8")


@pytest.mark.parametrize(
    ("said", "combination"),
    [
        ({"weight_dtype": "int8"}, (WEIGHTS, None, False, True)),
        ({"weight_dtype": "int8", "outliers": "smooth"}, (WEIGHTS, None, True, True)),
        ({"weight_dtype": "int8", "act_quant_dtype": "int8"}, (STATIC, None, False, False)),
        ({"weight_dtype": "int8", "act_quant_dtype": "int8", "outliers": "smooth"}, (STATIC, None, True, False)),
        ({"weight_dtype": "int8", "act_quant_dtype": "none", "kvcache_dtype": "int8"}, (WEIGHTS, "channel", False, True)),
        ({"kvcache_dtype": "int8", "kv_granularity": "per_token"}, (None, "token", False, False)),
        ({"kvcache_dtype": "int8", "outliers": "smooth"}, (None, "channel", False, False)),
    ],
)
def test_ptq_is_what_its_options_say(said: dict[str, Any], combination: tuple[Any, ...]) -> None:
    recipe = plan("ptq", **said)
    assert (recipe.linear, recipe.kv_cache, recipe.smooth, recipe.half_scales) == combination


@pytest.mark.parametrize("said", [{}, {"weight_dtype": "none"}, {"act_quant_dtype": "int8"}, {"outliers": "smooth"}])
def test_ptq_of_a_combination_that_does_not_exist_is_refused(said: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="A16W8 or A8W8 or C8 or A16W8C8 or A8W8C8"):
        plan("ptq", **said)


def test_the_yaml_of_the_same_method_says_what_options_leave_open(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = plan("ptq", PTQ)
    assert (recipe.linear, recipe.smooth, recipe.alpha, recipe.not_converted) == (STATIC, True, 0.7, ("wo",))
    assert plan("rtn-a16w8", RTN).not_converted == ("lm_head", "w2")
    assert plan("smooth_quant", SMOOTH).alpha == 0.8
    assert plan("smooth_quant", replace(SMOOTH, algorithm_args={"smooth_alpha": 1})).alpha == 1.0
    assert capsys.readouterr().err == ""


def test_options_go_over_the_yaml() -> None:
    recipe = plan("ptq", PTQ, act_quant_dtype="none", outliers="none", alpha=0.2, not_converted=("lm_head", "w2"))
    assert (recipe.linear, recipe.smooth, recipe.alpha, recipe.not_converted) == (WEIGHTS, False, 0.2, ("lm_head", "w2"))
    assert plan("smooth_quant", SMOOTH, alpha=0.0).alpha == 0.0


def test_a_yaml_that_names_no_layers_leaves_the_preset() -> None:
    assert plan("smooth_quant", SMOOTH).not_converted == ("lm_head", "w2")
    assert plan("rtn-a16w8", replace(RTN, modules_to_not_convert=())).not_converted == ("lm_head",)


@pytest.mark.parametrize(("approach", "yaml"), [("smooth_quant", RTN), ("gptq", PTQ), ("rtn-a16w8", SMOOTH)])
def test_the_yaml_of_another_method_is_left_aside_and_named(
    approach: str, yaml: QuantizationSettings, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan(approach, yaml) == plan(approach)
    told = capsys.readouterr().err
    assert told.startswith(f"warning: quantization_config ({yaml.quant_method}) does not match -a {approach} and is ignored")
    assert told.count("\n") == 1


def test_groups_signs_and_folding_shape_the_recipe() -> None:
    assert plan("gptq", group_size=64, symmetric=False).linear == LinearScheme(bits=4, group_size=64, symmetric=False)
    assert plan("awq").linear == LinearScheme(bits=4, group_size=128)
    assert plan("awq", symmetric=True).linear == LinearScheme(bits=4, group_size=128)
    assert plan("smooth_quant", fold=True).build_scheme(LLAMA_7B).name == "a8w8-static"
    assert plan("gptq", kvcache_dtype="int8").build_scheme(LLAMA_7B).name == "a16w4-g128-c8"
    assert plan("a8w8", kvcache_dtype="none").kv_cache is None


def test_groups_that_do_not_divide_name_a_size_that_does() -> None:
    with pytest.raises(ConfigError, match=r"self_attn\.q_proj has 4096 input channels.* groups of 96; use --group-size 128"):
        plan("rtn-a16w4", group_size=96).build_scheme(LLAMA_7B)


@pytest.mark.parametrize(
    ("approach", "needs"),
    [("rtn-a16w8", False), ("rtn-a16w4", False), ("a8w8", False), ("rtn-c8", True), ("smooth_quant", True), ("gptq", True)],
)
def test_who_has_to_see_samples(approach: str, needs: bool) -> None:
    assert plan(approach).needs_samples is needs


def test_a_cache_with_scales_of_each_token_needs_no_samples() -> None:
    assert not plan("rtn-a16w8", kvcache_dtype="int8", kv_granularity="per_token").needs_samples
    assert plan("rtn-a16w8", kvcache_dtype="int8").needs_samples


def test_the_report_lists_the_worst_linears_and_each_input_once() -> None:
    def entry(name: str, error: float, outlier: float) -> dict[str, Any]:
        seen = {"outlier": outlier, "outlier_channel": 3, "median_absmax": 2.0}
        return {"linear": f"model.layers.0.{name}", "error_of": "output", "relative_error": error, **seen}

    linears = [entry("self_attn.q_proj", 0.01, 40.0), entry("self_attn.k_proj", 0.03, 40.0), entry("mlp.down_proj", 0.02, 90.0)]
    sizes = {"source_bytes": 4_000_000, "written_bytes": 1_000_000}
    lines = describe_report({"approach": "gptq", "quantization": "a16w4", "samples": 2, "sample_tokens": 9, "linears": linears, **sizes})
    assert lines == [
        "gptq: a16w4, 2 samples, 9 tokens",
        "relative error of the outputs: mean 0.0200 over 3 linears; the largest:",
        "  0.0300  model.layers.0.self_attn.k_proj",
        "  0.0200  model.layers.0.mlp.down_proj",
        "  0.0100  model.layers.0.self_attn.q_proj",
        "largest inputs, against the median channel of the same input:",
        "  90.0 / 2.00  channel 3 of model.layers.0.mlp.down_proj",
        "  40.0 / 2.00  channel 3 of model.layers.0.self_attn.q_proj",
        "tensors: 4.0 MB before, 1.0 MB after (25%)",
    ]
