"""Gemma 3, text models: Gemma 2 with normalized heads, five layers of six with a window and their own rotary base."""

from collections.abc import Mapping
from typing import Any

from model.spec.architecture import Architecture
from model.spec.config_keys import CONFIG_KEYS
from model.spec.families.gemma2 import DEFAULTS, FEATURES, FIXED, IGNORED, READ, read_layers
from model.spec.quoting import quote
from model.spec.windows import FULL, SLIDING
from parallel.errors import ConfigError

_KINDS = {FULL, SLIDING}


def _rewrite(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """Take transformers 5's rope_parameters of each kind of layer apart."""
    section = raw.get("rope_parameters")
    if not isinstance(section, Mapping) or not _KINDS & section.keys():
        return raw
    full, local = section.get(FULL) or {}, section.get(SLIDING) or {}
    if section.keys() - _KINDS or not isinstance(full, Mapping) or not isinstance(local, Mapping):
        raise ConfigError(f"rope_parameters has the keys {quote(sorted(section))}, but only {FULL!r} and {SLIDING!r} are known")
    if local.get("rope_type", "default") != "default" or local.keys() - {"rope_type", "rope_theta"}:
        raise ConfigError(f"rope_parameters of {SLIDING!r} are {quote(dict(local))}, but only a rope_theta is supported there")
    theta = local.get("rope_theta")
    return {**raw, "rope_parameters": dict(full), **({} if theta is None else {"rope_local_base_freq": theta})}


def _read(raw: Mapping[str, Any]) -> dict[str, Any]:
    pattern = raw["sliding_window_pattern"] if raw.get("sliding_window_pattern") else raw.get("_sliding_window_pattern", 6)
    if type(pattern) is not int or pattern < 1:
        raise ConfigError(f"sliding_window_pattern is {quote(pattern)}, but a whole number of at least 1 is needed")
    return {**read_layers(raw, pattern), "local_rope_theta": raw["rope_local_base_freq"]}


ARCHITECTURE = Architecture(
    model_type="gemma3_text",
    class_names=("Gemma3ForCausalLM", "Gemma3TextModel"),
    keys=CONFIG_KEYS.adapt(
        "config.json of gemma3_text",
        read=(*READ, "rope_local_base_freq", "sliding_window_pattern", "_sliding_window_pattern"),
        ignored=IGNORED,
        fixed=FIXED,
        harmless=("cache_implementation",),
    ),
    defaults={**DEFAULTS, "max_position_embeddings": 131072, "rope_theta": 1e6, "rope_local_base_freq": 10000.0},
    features={**FEATURES, "qk_norm": True},
    read=_read,
    rewrite=_rewrite,
)
