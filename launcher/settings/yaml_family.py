"""The model family that a MindFormers YAML describes: by its types and by the biases that it sets."""

from collections.abc import Mapping
from typing import Any

from launcher.settings.yaml_null import is_null
from model.spec.architecture import Architecture
from model.spec.families import list_architectures
from parallel.errors import ConfigError

DEFAULT_TYPE = "LlamaConfig"
BIAS_KEYS = ("qkv_has_bias", "add_qkv_bias")


def list_names(ending: str) -> tuple[str, ...]:
    """Return the known types with this ending, in alphabetical order."""
    return tuple(sorted({name for family in list_architectures().values() for name in family.mindformers if name.endswith(ending)}))


def read_biased(model: Mapping[str, Any]) -> bool | None:
    """Return whether a model_config sets biases of queries, keys and values; None if it does not say. Raises ConfigError if both differ."""
    said = {key: model[key] for key in BIAS_KEYS if not is_null(model.get(key))}
    if len(set(said.values())) > 1:
        words = " but ".join(f"{key} is {value}" for key, value in said.items())
        raise ConfigError(f"model.model_config: {words}: remove the wrong one")
    return next(iter(said.values()), None)


def find_family(model: Mapping[str, Any], arch: str | None) -> Architecture | None:
    """Return the family of a model_config; None if neither a type nor biases are given. Raises ConfigError if they contradict each other.

    `arch`: type of the section arch.
    """
    kind, biased = model.get("type"), read_biased(model)
    if is_null(kind) and arch is None and biased is None:
        return None
    names = [name for name in (DEFAULT_TYPE if is_null(kind) and arch is None else kind, arch) if not is_null(name)]
    families = [family for family in list_architectures().values() if all(name in family.mindformers for name in names)]
    if not families:
        raise ConfigError(f"model.model_config has the type {names[0]}, but model.arch the type {names[-1]}: use those of one model")
    wanted = biased if biased is not None else (False if len(families) > 1 else None)
    found = [family for family in families if wanted in (None, family.features.get("attention_bias", False))]
    if not found:
        raise ConfigError(f"model.model_config: {BIAS_KEYS[0]} is {wanted}, but models of type {names[0]} have other biases: remove it")
    return found[0]
