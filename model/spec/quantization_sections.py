"""The sections of a `quantization_config`: groups of linears, their weights and activations, and the KV cache."""

import re
from collections.abc import Mapping
from typing import Any

from model.spec.linear_scheme import MAX_GROUP, LinearGroup, LinearScheme
from model.spec.quantization_keys import ARGUMENT_KEYS, GROUP_KEYS
from model.spec.quoting import quote
from parallel.errors import ConfigError

SMOOTH = "smooth-"
"""Prefix of the formats with smooth scales. Other programs do not support it, and so cannot load them by mistake."""
KV_CACHE_KEY = "kv_cache_quantization"
"""Key of config.json for int8 caches that compressed-tensors cannot express."""
_FORMATS = {"pack-quantized": True, "int-quantized": False, "float-quantized": False, "naive-quantized": False}
"""Whether the format packs integers into words."""
_ACT_ORDER = {"group": True, "dynamic": True, "weight": False, "static": False}
"""compressed-tensors' values, and whether the columns of a group may then be anywhere."""
ALL_LINEARS = ("Linear",)
"""The class that names every linear."""
_MAX_PATTERN, _MAX_REPEATS = 200, 4
"""Larger patterns could take hours to match a single name."""


def read_section(value: Any, name: str) -> Mapping[str, Any]:
    """Return a section of config.json; empty if it is missing."""
    if value is not None and not isinstance(value, Mapping):
        place = name if name in ("quantization_config", KV_CACHE_KEY) else f"quantization_config: {name}"
        raise ConfigError(f"{place} is {quote(value)}, but an object is needed")
    return value or {}


def read_flag(section: Mapping[str, Any], key: str, default: bool) -> bool:
    """Return a flag of `quantization_config`. Raises ConfigError unless it is true or false."""
    value = section.get(key)
    if value is not None and not isinstance(value, bool):
        raise ConfigError(f"quantization_config: {key} is {quote(value)}, but true or false is needed")
    return default if value is None else value


def read_names(value: Any, key: str) -> tuple[str, ...]:
    """Return a list of names and patterns. Raises ConfigError."""
    entries = [] if value is None else value
    if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
        raise ConfigError(f"quantization_config: {key} is {quote(value)}, but a list of names is needed")
    for entry in entries:
        if entry.startswith("re:"):
            check_pattern(entry, key)
    return tuple(entries)


def check_pattern(entry: str, key: str) -> None:
    """Raise ConfigError for an invalid regular expression (after a three-character prefix), or one that could run for hours."""
    plain = re.sub(r"\\.", "", entry[3:])
    repeats = sum(plain.count(sign) for sign in "*+{")
    if len(entry) > _MAX_PATTERN or repeats > _MAX_REPEATS or re.search(r"\)[*+{]", plain):
        raise ConfigError(
            f"quantization_config: the pattern {quote(entry)} in {key} is not supported; up to {_MAX_PATTERN} characters and "
            f"{_MAX_REPEATS} of * and +, none behind a group, are"
        )
    try:
        re.compile(entry[3:])
    except (re.error, OverflowError, RecursionError) as error:
        raise ConfigError(f"quantization_config: {quote(entry)} in {key} is no pattern: {error}") from None


def read_group(group: Mapping[str, Any], default_format: Any) -> LinearGroup:
    """Return the linears of a group of config_groups and their scheme. Raises ConfigError."""
    targets = read_names(group.get("targets"), "targets")
    if not targets or any("." not in target and target not in (*ALL_LINEARS, "lm_head") for target in targets):
        raise ConfigError(
            f"quantization_config: targets {quote(group.get('targets'))} are not supported; 'Linear', full names and 're:' patterns are"
        )
    return LinearGroup(targets, _read_linear(group, default_format))


def _read_linear(group: Mapping[str, Any], default_format: Any) -> LinearScheme:
    format = group.get("format") or default_format or ""
    if not isinstance(format, str) or format.removeprefix(SMOOTH) not in _FORMATS:
        raise ConfigError(f"quantization_config: format {quote(format)} is not supported; there are {', '.join(_FORMATS)}")
    GROUP_KEYS.check(group, "quantization_config: a group of config_groups")
    weights = read_section(group.get("weights"), "weights")
    activations = read_section(group.get("input_activations"), "input_activations")
    if format == "float-quantized" or (format == "naive-quantized" and weights.get("type") == "float"):
        return _read_float8(weights, activations)
    _check_int(weights, "weights", ("channel", "group"), dynamic=(False,))
    if activations:
        _check_int(activations, "input_activations", ("token", "tensor"), dynamic=(True, False))
        if activations.get("num_bits") != 8 or bool(activations.get("dynamic")) != (activations["strategy"] == "token"):
            raise ConfigError("quantization_config: input_activations have to be 8 bits, dynamic for each token or static for the tensor")
    is_grouped, order = weights["strategy"] == "group", weights.get("actorder")
    if is_grouped and weights.get("group_size") is None:
        raise ConfigError("quantization_config: weights lack group_size, which strategy 'group' needs")
    if order not in (None, False) and not (isinstance(order, str) and order in _ACT_ORDER):
        raise ConfigError(f"quantization_config: actorder {quote(order)} is not supported; there are {', '.join(_ACT_ORDER)}")
    return LinearScheme(
        bits=weights.get("num_bits"),  # type: ignore[arg-type]  # LinearScheme rejects non-numbers
        group_size=weights["group_size"] if is_grouped else None,
        symmetric=read_flag(weights, "symmetric", True),
        packed=_FORMATS[format.removeprefix(SMOOTH)],
        act_order=isinstance(order, str) and _ACT_ORDER[order],
        activation=activations["strategy"] if activations else None,
        activation_symmetric=read_flag(activations, "symmetric", True),
        smooth=format.startswith(SMOOTH),
    )


def _read_float8(weights: Mapping[str, Any], activations: Mapping[str, Any]) -> LinearScheme:
    """Read FP8 weights. Their activations stay in the compute dtype, of which a note tells."""
    _check_args(weights, "weights", {"type": ("float",), "num_bits": (8,), "strategy": ("tensor", "channel", "group", "block")}, (False,))
    if activations:
        allowed = {"type": ("float",), "num_bits": (8,), "strategy": ("tensor", "token", "group", "channel")}
        _check_args(activations, "input_activations", allowed, (True, False))
    strategy, rows, columns = weights["strategy"], 1, None
    if strategy == "block":
        rows, columns = read_block(weights.get("block_structure"), "block_structure")
    elif strategy == "group":
        columns = weights.get("group_size")
        if columns is None:
            raise ConfigError("quantization_config: weights lack group_size, which strategy 'group' needs")
    return LinearScheme(
        packed=False,
        float8=True,
        symmetric=read_flag(weights, "symmetric", True),
        act_order=weights.get("actorder") not in (None, False),
        group_size=columns,
        row_block=None if strategy == "tensor" else rows,
    )


def read_block(value: Any, key: str) -> tuple[int, int]:
    """Return the rows and columns of an FP8 block. Raises ConfigError unless it is a list of two whole numbers."""
    sizes = value if isinstance(value, list) else []
    if len(sizes) != 2 or any(type(size) is not int or not 1 < size <= MAX_GROUP for size in sizes):
        raise ConfigError(f"quantization_config: {key} is {quote(value)}, but two whole numbers from 2 are needed, such as [128, 128]")
    return sizes[0], sizes[1]


def read_kv_cache(raw: Mapping[str, Any]) -> str | None:
    """Return the strategy of an int8 KV cache; None: there is none. Raises ConfigError."""
    if not raw:
        return None
    _check_int(raw, "kv_cache_scheme", ("tensor", "channel", "token"), dynamic=(True, False))
    if raw.get("num_bits") != 8 or not read_flag(raw, "symmetric", True) or bool(raw.get("dynamic")) != (raw["strategy"] == "token"):
        raise ConfigError("quantization_config: kv_cache_scheme has to be symmetric int8, static (tensor, channel) or dynamic (token)")
    return str(raw["strategy"])


def _check_int(raw: Mapping[str, Any], section: str, strategies: tuple[str, ...], dynamic: tuple[bool, ...]) -> None:
    _check_args(raw, section, {"type": ("int",), "strategy": strategies}, dynamic)
    if raw.get("block_structure") is not None:
        raise ConfigError(f"quantization_config: block_structure of {section} is {quote(raw['block_structure'])}, but only FP8 has blocks")


def _check_args(raw: Mapping[str, Any], section: str, allowed: Mapping[str, tuple[Any, ...]], dynamic: tuple[bool, ...]) -> None:
    ARGUMENT_KEYS.check(raw, f"quantization_config: {section}")
    for key, values in {**allowed, "dynamic": dynamic}.items():
        found = raw.get(key) or False if key == "dynamic" else raw.get(key)
        if type(found) not in (str, bool, int) or not any(found == value and type(found) is type(value) for value in values):
            known = " or ".join(map(repr, values))
            raise ConfigError(f"quantization_config: {key} of {section} is {quote(found)}, but only {known} is supported")
