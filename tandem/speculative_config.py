"""vLLM's `speculative_config` of `LLM`, as the options of tandem that mean the same."""

from collections.abc import Mapping
from typing import Any

from parallel.errors import ConfigError

_KEYS = ("model", "num_speculative_tokens", "method")
_METHODS = ("draft_model", "ngram")


def read_speculative_config(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of an `LLM` with `speculative_config` replaced by `draft_model` and `draft_tokens`, or by `speculate`.

    Raises ConfigError for keys and methods that do not exist here, and for options that are given twice.
    """
    given = dict(options)
    config = given.pop("speculative_config", None)
    if config is None:
        return given
    if not isinstance(config, Mapping):
        raise ConfigError(f"speculative_config is a {type(config).__name__}, but a dictionary is needed")
    unknown = next((key for key in config if key not in _KEYS), None)
    if unknown is not None:
        raise ConfigError(f"speculative_config has the key {unknown!r}, but tandem supports {', '.join(_KEYS)}: leave it out")
    model, method = config.get("model"), config.get("method")
    if method not in (None, *_METHODS):
        raise ConfigError(f"speculative_config.method is {method!r}, but tandem supports {' and '.join(_METHODS)}")
    if method == "ngram":
        if model is not None:
            raise ConfigError(f"speculative_config.model is {model!r}, but the method ngram needs no model: leave one of them out")
        found: dict[str, Any] = {"speculate": True}  # prompt lookup chooses the number of draft tokens itself
    elif model is None:
        raise ConfigError("speculative_config has no model: name a smaller model of the same vocabulary, or set method to ngram")
    else:
        found = {"draft_model": model, "draft_tokens": config.get("num_speculative_tokens")}
    twice = next((name for name in found if given.get(name) is not None), None)
    if twice is not None:
        raise ConfigError(f"speculative_config and {twice} are both given: give one of them")
    return {**given, **found}
