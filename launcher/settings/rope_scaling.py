"""Conversion of `extend_method` and `scaling_factor` of a MindFormers model_config to keys of a config.json.

extend_method  scaling_factor            config.json                   in MindFormers (FreqsMgr)
PI             number                    rope_scaling linear           positions are divided by it
linear         {factor}                  rope_scaling linear           frequencies are divided by it
NTK            number                    rope_theta times the number   theta is multiplied by it, at any length
YARN           {factor, beta_fast, ...}  rope_scaling yarn             cosine and sine are scaled by a ratio of mscale
LLAMA3         {factor, ...}             rope_scaling llama3           as in Llama 3.1
"""

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from launcher.settings.yaml_null import is_null
from model.spec.rope_scaling import RopeScaling, Scaling, build_scaling
from parallel.errors import ConfigError

ROPE_SCALING, ROPE_THETA = "rope_scaling", "rope_theta"
_KEY = "model.model_config.scaling_factor"
_DEFAULT_THETA = 10000.0
_FACTORS: Mapping[str, tuple[str, ...]] = {
    "LLAMA3": tuple(entry.name for entry in fields(RopeScaling)),
    "YARN": ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
    "linear": ("factor",),
}
"""Keys of `scaling_factor` by the methods that take a mapping; MindFormers requires all of them."""
_ROPE_TYPES = {"LLAMA3": "llama3", "YARN": "yarn", "linear": "linear", "PI": "linear"}


def read_rope_scaling(model: Mapping[str, Any]) -> dict[str, Any]:
    """Return `rope_scaling` or `rope_theta` for the extend_method of a model_config; an empty dict without one.

    Raises ConfigError for missing, unknown or invalid factors.
    """
    method, factors = model.get("extend_method"), model.get("scaling_factor")
    if is_null(method):
        return {}
    if method in _FACTORS:
        return {ROPE_SCALING: _read_mapping(str(method), factors)}
    factor = 1.0 if is_null(factors) else factors
    if not isinstance(factor, (int, float)) or isinstance(factor, bool) or factor <= 0:
        raise ConfigError(f"{_KEY} is {factors!r}, but extend_method {method} needs a number above 0")
    if method == "PI":
        return {} if factor == 1 else {ROPE_SCALING: _check({"rope_type": "linear", "factor": float(factor)})}
    theta: float = _DEFAULT_THETA if is_null(model.get("theta")) else model["theta"]
    return {ROPE_THETA: theta * float(factor)}


def _read_mapping(method: str, factors: Any) -> dict[str, Any]:
    keys = _FACTORS[method]
    if not isinstance(factors, Mapping):
        raise ConfigError(f"{_KEY} is {factors!r}, but extend_method {method} needs a mapping of {', '.join(keys)}")
    if unknown := [key for key in factors if key not in keys]:
        raise ConfigError(f"{_KEY}.{unknown[0]} is not a known key; extend_method {method} has {', '.join(keys)}")
    values = {str(key): value for key, value in factors.items() if not is_null(value)}
    if method == "YARN":
        if missing := [key for key in keys if key not in values]:
            raise ConfigError(f"{_KEY} lacks {', '.join(missing)}, which extend_method YARN needs")
        _check({"rope_type": "yarn", **values})
        numerator, denominator = (_scale_attention(values["factor"], values.pop(key)) for key in ("mscale", "mscale_all_dim"))
        # Given explicitly, since transformers has another rule where one of the two is 0.
        values["attention_factor"] = numerator / denominator
    return _check({"rope_type": _ROPE_TYPES[method], **values})


def _scale_attention(factor: float, scale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def _check(scaling: dict[str, Any]) -> dict[str, Any]:
    """Return the scaling. Raises ConfigError if it is invalid."""
    try:
        build_scaling(scaling, None)
    except ConfigError as error:
        raise ConfigError(f"{_KEY}: {error}") from None
    return scaling


def describe_scaling(scaling: Scaling | None) -> str:
    """Describe the scaling in a few words."""
    if scaling is None:
        return "none"
    kind = {"RopeScaling": "llama3", "LinearScaling": "linear", "YarnScaling": "yarn"}[type(scaling).__name__]
    return f"{kind} {', '.join(f'{entry.name} {getattr(scaling, entry.name):g}' for entry in fields(scaling))}"
