"""Which layers attend over a window, from the keys `sliding_window` and `layer_types` of config.json."""

from collections.abc import Mapping, Sequence
from typing import Any

from model.spec.quoting import quote
from parallel.errors import ConfigError

FULL, SLIDING = "full_attention", "sliding_attention"


def read_windows(raw: Mapping[str, Any], window: Any, layer_types: Sequence[str]) -> dict[str, Any]:
    """Return `sliding_window` and `full_attention_layers` of LlamaConfig.

    `window`: in tokens, None without; `layer_types`: of every layer, where the config does not name them. Raises ConfigError if the
    config names other types, or sliding layers without a window.
    """
    given = raw.get("layer_types")
    types = layer_types if given is None else given
    if not isinstance(types, Sequence) or not all(isinstance(one, str) and one in (FULL, SLIDING) for one in types):
        raise ConfigError(f"layer_types is {quote(types)}, but a list of {FULL!r} and {SLIDING!r} is needed")
    count = raw["num_hidden_layers"]
    if type(count) is int and len(types) < count:
        raise ConfigError(f"layer_types names {len(types)} layers, but num_hidden_layers is {count}")
    full = tuple(index for index, kind in enumerate(types) if kind == FULL)
    if len(full) == len(types):
        return {"sliding_window": None}
    if window is None:
        raise ConfigError(f"layer_types names {SLIDING!r}, but there is no sliding_window")
    return {"sliding_window": window, "full_attention_layers": full}


def read_uniform_window(raw: Mapping[str, Any], window: Any) -> dict[str, Any]:
    """Do the same for families in which all layers have the window. Raises ConfigError for layer types that differ."""
    kind = FULL if window is None else SLIDING
    given = raw.get("layer_types")
    if given is not None and given != [kind] * len(given):
        raise ConfigError(f"layer_types is {quote(given)}, but every layer has sliding_window {quote(window)} in this family")
    return {"sliding_window": window}


def read_late_windows(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Do the same for Qwen, whose layers from `max_window_layers` on have a window if `use_sliding_window` is set."""
    used, first, count = raw.get("use_sliding_window"), raw.get("max_window_layers"), raw["num_hidden_layers"]
    if not isinstance(used, bool | None) or type(first) is not int or type(count) is not int:
        raise ConfigError(
            f"use_sliding_window is {quote(used)} and max_window_layers {quote(first)}: true or false and a number are needed"
        )
    window = raw.get("sliding_window") if used else None
    types = [SLIDING if window is not None and index >= first else FULL for index in range(min(count, 100_000))]
    return read_windows(raw, window, types)
