"""A folder written by AutoRound: GPTQ's or AWQ's tensors under AutoRound's settings, with exceptions for single linears."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from model.checkpoint.awq_folder import AwqFolder
from model.checkpoint.column_packed import ColumnPackedFolder, declares_method, read_bits, read_group_size
from model.checkpoint.gptq_folder import GptqFolder
from model.spec.config import read_config
from model.spec.linear_scheme import LinearScheme
from model.spec.quantization_keys import AUTO_ROUND_KEYS
from model.spec.quantization_sections import check_pattern, read_flag
from model.spec.quoting import quote
from parallel.errors import ConfigError

SETTINGS_FILE = "quantization_config.json"
_METHODS = ("auto-round", "autoround", "intel/auto-round")
_GPTQ = ("auto_round:auto_gptq", "auto_round:gptq", "auto_round:gptq:exllamav2")
_AWQ = ("auto_round:auto_awq", "auto_round:awq")
_ENTRY_KEYS = ("bits", "group_size", "sym", "data_type")
_SPECIAL = set("*+?^$()[]{}|\\")
_FLOAT_BITS = 16
"""At least so many bits mean that a linear is not quantized, which is evident from its tensors."""


def is_auto_round(path: Path) -> bool:
    """Return whether a folder declares AutoRound weights; False if it cannot be read."""
    return any(declares_method(path, method, SETTINGS_FILE, by_default=False) for method in _METHODS)


def open_auto_round(path: Path, *, follow_links: bool = False) -> ColumnPackedFolder:
    """Open such a folder.

    Raises ConfigError for unsupported settings, CheckpointError for files and tensors that contradict them.
    """
    settings = _read_settings(path)
    AUTO_ROUND_KEYS.check(settings, f"{path}: quantization_config")
    packing = settings.get("packing_format") or settings.get("backend")
    find_linear = _read_linears(settings, bits=(4,) if packing in _AWQ else (4, 8))
    if packing not in (*_GPTQ, *_AWQ):
        raise ConfigError(
            f"quantization_config: packing_format {quote(packing)} of AutoRound is not supported; there are {', '.join((*_GPTQ, *_AWQ))}"
        )
    opened = (AwqFolder if packing in _AWQ else GptqFolder)(path, follow_links=follow_links, find_linear=find_linear)
    opened.notes += tuple(AUTO_ROUND_KEYS.describe(settings, f"{path}: quantization_config"))
    return opened


def _read_settings(path: Path) -> Mapping[str, Any]:
    declared = read_config(path / "config.json").get("quantization_config")
    if declared is None:
        declared = read_config(path / SETTINGS_FILE)
    if not isinstance(declared, Mapping):
        raise ConfigError(f"quantization_config is {quote(declared)}, but an object is needed")
    return declared


def _read_linears(settings: Mapping[str, Any], bits: tuple[int, ...]) -> Callable[[str], LinearScheme]:
    """Return the scheme of a linear by name: of its entry in `extra_config`, else of the first pattern there that is found in it."""
    extra = settings.get("extra_config") or {}
    if not isinstance(extra, Mapping):
        raise ConfigError(f"quantization_config: extra_config is {quote(extra)}, but an object is needed")
    common, exact, patterns = _read_linear(settings, bits), dict[str, LinearScheme](), list[tuple[str, LinearScheme]]()
    for name, changes in extra.items():
        if not isinstance(changes, Mapping):
            raise ConfigError(f"quantization_config: extra_config gives {quote(name)} {quote(changes)}, but an object is needed")
        AUTO_ROUND_KEYS.check(changes, f"quantization_config: extra_config {quote(name)}")
        unknown = next((key for key in changes if key not in _ENTRY_KEYS and not AUTO_ROUND_KEYS.knows(key)), None)
        if unknown is not None:
            raise ConfigError(f"quantization_config: extra_config changes {quote(unknown)} for {quote(name)}, which is not supported")
        merged = {**settings, **changes}
        is_float = type(merged.get("bits")) is int and merged["bits"] >= _FLOAT_BITS
        scheme = common if is_float else _read_linear(merged, bits)
        if _SPECIAL.intersection(name):
            check_pattern(f"   {name}", "extra_config")
            patterns.append((name, scheme))
        else:
            exact[name] = scheme
    return lambda name: exact.get(name) or next((one for pattern, one in patterns if re.search(pattern, name)), common)


def _read_linear(settings: Mapping[str, Any], bits: tuple[int, ...]) -> LinearScheme:
    kind = settings.get("data_type") or "int"
    if kind != "int":
        raise ConfigError(f"quantization_config: data_type {quote(kind)} of AutoRound is not supported; only 'int' is")
    return LinearScheme(
        bits=read_bits(settings, ("bits",), bits),
        group_size=read_group_size(settings, ("group_size",)),
        symmetric=read_flag(settings, "sym", True),
    )
