"""Conversion of `extend_method` and `scaling_factor` of a MindFormers model_config to `rope_scaling` of a config.json."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from launcher.settings.yaml_null import is_null
from model.spec.rope_scaling import RopeScaling, Scaling, build_scaling
from parallel.errors import ConfigError

ROPE_SCALING = "rope_scaling"
_STRETCH_KEYS = tuple(entry.name for entry in fields(RopeScaling))


def read_rope_scaling(model: Mapping[str, Any]) -> dict[str, Any]:
    """Return `rope_scaling` for extend_method LLAMA3, or an empty dict without one. Raises ConfigError for missing factors."""
    if is_null(model.get("extend_method")):
        return {}
    factors = model.get("scaling_factor")
    if not isinstance(factors, Mapping):
        raise ConfigError(
            f"model.model_config.scaling_factor is {factors!r}, but extend_method LLAMA3 needs a mapping of {', '.join(_STRETCH_KEYS)}"
        )
    if unknown := [key for key in factors if key not in _STRETCH_KEYS]:
        raise ConfigError(f"model.model_config.scaling_factor.{unknown[0]} is not a known key; there are {', '.join(_STRETCH_KEYS)}")
    scaling = {ROPE_SCALING: {"rope_type": "llama3", **{key: value for key, value in factors.items() if not is_null(value)}}}
    try:
        build_scaling(scaling[ROPE_SCALING], None)
    except ConfigError as error:
        raise ConfigError(f"model.model_config.scaling_factor: {error}") from None
    return scaling


def describe_scaling(scaling: Scaling | None) -> str:
    """Describe the scaling in a few words."""
    if not isinstance(scaling, RopeScaling):
        return "none" if scaling is None else str(scaling)
    return f"llama3 {', '.join(f'{key} {getattr(scaling, key):g}' for key in _STRETCH_KEYS)}"
