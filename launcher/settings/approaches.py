"""The approaches of `tandem quantize -a`, and the recipe of an approach with its options.

Does not depend on checkpoints, data or PyTorch.
"""

import sys
from dataclasses import dataclass, replace

from launcher.settings.checkpoint_options import QuantizeOptions
from launcher.settings.quantization import QuantizationSettings
from model.quantization.recipe import Recipe
from model.spec.linear_scheme import LinearScheme
from parallel.errors import ConfigError

DEFAULT_GROUP_SIZE = 128
KV_GRANULARITIES = {"per_channel": "channel", "per_token": "token"}

_WEIGHTS = LinearScheme()
_STATIC = LinearScheme(packed=False, activation="tensor", activation_symmetric=False)
_DYNAMIC = LinearScheme(packed=False, activation="token")
_HEAD, _HEAD_AND_DOWN = ("lm_head",), ("lm_head", "w2")


@dataclass(frozen=True, slots=True)
class Preset:
    """The defaults of an approach."""

    linear: LinearScheme | None
    not_converted: tuple[str, ...]
    method: str = "rtn"
    smooth: bool = False
    kv_cache: bool = False
    quant_method: str | None = None
    """The equivalent quant_method in a YAML's quantization_config."""
    options: tuple[str, ...] = ()
    """The options that apply to it."""


APPROACHES = {
    "rtn-a16w8": Preset(_WEIGHTS, _HEAD, quant_method="rtn", options=("kvcache_dtype",)),
    "rtn-c8": Preset(None, (), kv_cache=True, quant_method="rtn"),
    "smooth_quant": Preset(_STATIC, _HEAD_AND_DOWN, smooth=True, quant_method="smooth_quant", options=("alpha", "fold")),
    "ptq": Preset(
        None,
        (),
        quant_method="ptq",
        options=("weight_dtype", "kvcache_dtype", "act_quant_dtype", "outliers", "alpha", "fold"),
    ),
    "gptq": Preset(LinearScheme(bits=4), _HEAD, method="gptq", options=("group_size", "symmetric", "kvcache_dtype")),
    "awq": Preset(LinearScheme(bits=4), _HEAD, method="awq", options=("group_size", "symmetric", "kvcache_dtype")),
    "rtn-a16w4": Preset(LinearScheme(bits=4), _HEAD, options=("group_size", "symmetric", "kvcache_dtype")),
    "a8w8": Preset(_DYNAMIC, _HEAD, options=("kvcache_dtype",)),
}
_NOT_GIVEN = (None, "none", "None")
_RTN = "rtn"
"""Golden Stick's word for both kinds of rounding to nearest."""


def plan_recipe(options: QuantizeOptions, preset: Preset, yaml: QuantizationSettings | None) -> Recipe:
    """Build the recipe. A YAML's quantization_config with the same method determines alpha and which layers stay in float."""
    same = yaml if yaml is not None and yaml.quant_method == preset.quant_method else None
    if yaml is not None and same is None:
        print(f"warning: quantization_config ({yaml.quant_method}) does not match -a {options.approach} and is ignored", file=sys.stderr)
    linear, kv_cache, smooth = preset.linear, preset.kv_cache, preset.smooth
    if options.approach == "ptq":
        asked = QuantizationSettings(
            quant_method="ptq",
            weight_dtype=_dtype(options.weight_dtype, same.weight_dtype if same else None),
            activation_dtype=_dtype(options.act_quant_dtype, same.activation_dtype if same else None),
            kvcache_dtype=_dtype(options.kvcache_dtype, same.kvcache_dtype if same else None),
            outliers_suppression=_dtype(options.outliers, same.outliers_suppression if same else None),
        )
        linear = None if asked.weight_dtype is None else _STATIC if asked.activation_dtype else _WEIGHTS
        kv_cache, smooth = asked.kvcache_dtype == "int8", asked.outliers_suppression == "smooth"
    elif _dtype(options.kvcache_dtype, None) == "int8":
        kv_cache = True
    if options.kv_granularity and not kv_cache:
        raise ConfigError(f"--kvcache-granularity is {options.kv_granularity}, but no int8 cache is requested; add -k int8")
    if options.not_converted and linear is None:
        raise ConfigError(f"-b names layers that stay float, but -a {options.approach} produces no integer weights; drop -b")
    if options.lm_head == "int8" and (kept := next((word for word in options.not_converted if word in "lm_head"), None)):
        raise ConfigError(f"--lm-head is int8, but -b {kept} keeps the output head in float: drop one of them")
    if linear is not None and "group_size" in preset.options:
        symmetric = linear.symmetric if options.symmetric is None else options.symmetric
        linear = LinearScheme(bits=4, group_size=options.group_size or DEFAULT_GROUP_SIZE, symmetric=symmetric)
    algorithm_args = same.algorithm_args if same else {}
    alpha = options.alpha if options.alpha is not None else float(algorithm_args.get("alpha", algorithm_args.get("smooth_alpha", 0.5)))
    return Recipe(
        approach=options.approach,
        linear=linear,
        kv_cache=KV_GRANULARITIES[options.kv_granularity or "per_channel"] if kv_cache else None,
        method=preset.method,
        smooth=smooth and linear is not None,
        alpha=alpha,
        fold=bool(options.fold),
        half_scales=options.approach == "ptq" and linear is not None and linear.activation is None,
        int8_head=options.lm_head == "int8",
        not_converted=options.not_converted or (same.modules_to_not_convert if same else ()) or preset.not_converted,
    )


def resolve_approach(options: QuantizeOptions) -> QuantizeOptions:
    """Replace `-q rtn` by the approach that the types of weights and cache ask for."""
    if options.approach != _RTN:
        return options
    only_cache = options.kvcache_dtype == "int8" and options.weight_dtype in _NOT_GIVEN
    return replace(options, approach="rtn-c8" if only_cache else "rtn-a16w8")


def check_words(options: QuantizeOptions) -> Preset:
    if options.approach not in APPROACHES:
        raise ConfigError(f"the approach {options.approach!r} is unknown; there are {', '.join(APPROACHES)} (option -a)")
    preset = APPROACHES[options.approach]
    given = {
        "weight_dtype": ("-w", options.weight_dtype),
        "kvcache_dtype": ("-k", options.kvcache_dtype),
        "act_quant_dtype": ("--act-quant-dtype", options.act_quant_dtype),
        "outliers": ("--outliers", options.outliers),
        "alpha": ("--alpha", options.alpha),
        "fold": ("--fold", options.fold or None),
        "group_size": ("--group-size", options.group_size),
        "symmetric": ("--symmetric/--asymmetric", options.symmetric),
    }
    linear = preset.linear
    implied = {
        "weight_dtype": linear is not None and linear.bits == 8,
        "kvcache_dtype": preset.kv_cache,
        "act_quant_dtype": linear is not None and linear.activation is not None,
        "outliers": preset.smooth,
    }
    for name, (flag, value) in given.items():
        if value not in _NOT_GIVEN and name not in preset.options and not implied.get(name):
            takes = [word for word, other in APPROACHES.items() if name in other.options]
            raise ConfigError(f"{flag} does not go with -a {options.approach}; it does with {', '.join(takes)}")
    for flag, word, words in (
        ("-w", options.weight_dtype, ("int8", "none")),
        ("-k", options.kvcache_dtype, ("int8", "none")),
        ("--act-quant-dtype", options.act_quant_dtype, ("int8", "none")),
        ("--outliers", options.outliers, ("smooth", "none")),
        ("--kvcache-granularity", options.kv_granularity, tuple(KV_GRANULARITIES)),
    ):
        if word is not None and word not in (*words, *_NOT_GIVEN):
            raise ConfigError(f"{flag} is {word!r}, but has to be {' or '.join(words)}")
    if options.group_size is not None and options.group_size < 1:
        raise ConfigError(f"--group-size is {options.group_size}, but has to be at least 1; usual are 64 and 128")
    return preset


def _dtype(word: str | None, default: str | None) -> str | None:
    return default if word is None else None if word in _NOT_GIVEN else word
