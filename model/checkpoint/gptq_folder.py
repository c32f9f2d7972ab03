"""A folder written by AutoGPTQ, GPTQModel or transformers: GPTQ weights of 4 or 8 bits, packed along the inputs.

`qweight` is int32 [inputs * bits / 32, outputs] with the first input in the lowest bits, so its transpose is `weight_packed` as is.
`qzeros` holds each zero point minus 1 (modulo 2^bits), or the zero point itself if `checkpoint_format` is "gptq_v2".
`model/checkpoint/column_packed.py` handles the tensors; this module handles GPTQ's settings and bit order.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from model.checkpoint.column_packed import (
    ColumnFolder,
    ColumnPackedFolder,
    declares_method,
    quantized_linears,
    read_bits,
    read_group_size,
    read_settings,
)
from model.spec.linear_scheme import LinearScheme
from model.spec.quantization_keys import GPTQ_KEYS
from model.spec.quantization_sections import check_pattern, read_flag
from model.spec.quoting import quote
from parallel.errors import ConfigError
from parallel.file_slices import FileReader
from parallel.lazy_torch import torch

SETTINGS_FILE = "quantize_config.json"
_DYNAMIC_KEYS = ("bits", "group_size", "sym", "desc_act")


def is_gptq(path: Path) -> bool:
    """Return whether a folder declares GPTQ weights; False if it cannot be read."""
    return declares_method(path, "gptq", SETTINGS_FILE)


class GptqFolder(ColumnPackedFolder):
    """A GPTQ checkpoint; opening it reads the headers and biases.

    Raises ConfigError for unsupported settings, CheckpointError for files and tensors that contradict them.
    """

    def __init__(self, path: Path, *, follow_links: bool = False, find_linear: Callable[[str], LinearScheme] | None = None) -> None:
        """`find_linear`: schemes by name, from settings in another dialect; None: from GPTQ's settings."""
        folder = ColumnFolder(path, follow_links=follow_links)
        self.settings_name = "quantization_config of config.json" if folder.config.get("quantization_config") else SETTINGS_FILE
        self._zeros_minus_one, settings = True, dict[str, Any]()
        if find_linear is None:
            settings = read_settings(folder, SETTINGS_FILE)
            GPTQ_KEYS.check(settings, f"{path}: quantization_config")
            find_linear = _read_linears(settings)
            self._zeros_minus_one = _read_format(settings) == "gptq"
        stored = quantized_linears(folder)
        linears = {name: find_linear(name) for name in stored}
        shapes = {name: (rows, words * 32 // linears[name].bits) for name, (words, rows) in stored.items()}
        super().__init__(folder, linears, shapes)
        self.notes += tuple(GPTQ_KEYS.describe(settings, f"{path}: quantization_config"))

    def _advise_zero_points(self, shifted: set[int], middle: int) -> str:
        declared, other, distance = ("gptq", "gptq_v2", 1) if self._zeros_minus_one else ("gptq_v2", "gptq", -1)
        if shifted == {distance}:
            return (
                f", but {middle + distance}, as where a file of checkpoint_format {other!r} is read as {declared!r}: set "
                f"checkpoint_format to {other!r} in {self.settings_name}"
            )
        if shifted:
            return f", but {middle + next(iter(shifted))}: quantize or copy it again"
        return f": the weights are not symmetric; set sym to false in {self.settings_name}"

    def _read_weight(self, reader: FileReader, linear: str, start: int, stop: int) -> torch.Tensor:
        # Both formats store q = integer + 2^(bits - 1) with the first input lowest, so whole words are transposed.
        return self._folder.read_columns(reader, f"{linear}.qweight", start, stop).T.contiguous()

    def _order_zero_points(self, words: torch.Tensor, bits: int) -> torch.Tensor:
        if not self._zeros_minus_one:
            return words
        stored = words.contiguous().view(torch.uint8)
        if bits == 8:
            return (stored + 1).view(torch.int32)
        # Adding 16 to the byte adds 1 to its upper nibble and does not affect the lower one.
        return (((stored + 1) & 0x0F) | ((stored + 0x10) & 0xF0)).view(torch.int32)


def _read_linears(settings: Mapping[str, Any]) -> Callable[[str], LinearScheme]:
    """Return the scheme of a linear by name. `dynamic` gives linears individual settings; the first matching pattern applies.

    A pattern that starts with "-:" names linears that are not quantized, which is evident from their tensors.
    """
    dynamic = settings.get("dynamic") or {}
    if not isinstance(dynamic, dict):
        raise ConfigError(f"quantization_config: dynamic is {quote(dynamic)}, but an object is needed")
    found: list[tuple[str, LinearScheme]] = []
    linear = _read_linear(settings)
    for pattern, changes in dynamic.items():
        marked = pattern if pattern.startswith(("+:", "-:")) else f"+:{pattern}"
        check_pattern(f" {marked}", "dynamic")
        if marked.startswith("-:"):
            found.append((marked[2:], linear))
            continue
        if not isinstance(changes, dict):
            raise ConfigError(f"quantization_config: dynamic gives {quote(pattern)} {quote(changes)}, but an object is needed")
        GPTQ_KEYS.check(changes, f"quantization_config: dynamic {quote(pattern)}")
        unknown = next((key for key in changes if key not in _DYNAMIC_KEYS and key not in GPTQ_KEYS.harmless), None)
        if unknown is not None:
            raise ConfigError(f"quantization_config: dynamic changes {quote(unknown)} for {quote(pattern)}, which is not supported")
        found.append((marked[2:], _read_linear({**settings, **changes})))
    return lambda name: next((one for pattern, one in found if re.match(pattern, name)), linear)


def _read_linear(settings: Mapping[str, Any]) -> LinearScheme:
    group_size = read_group_size(settings, ("group_size",))
    return LinearScheme(
        bits=read_bits(settings, ("bits",), (4, 8)),
        group_size=group_size,
        symmetric=read_flag(settings, "sym", True),
        # A single group needs no ordering.
        act_order=read_flag(settings, "desc_act", False) and group_size is not None,
    )


def _read_format(settings: Mapping[str, Any]) -> str:
    first, second = settings.get("checkpoint_format"), settings.get("format")
    if first and second and first != second:
        raise ConfigError(f"quantization_config: checkpoint_format is {quote(first)}, but format is {quote(second)}: remove the wrong one")
    found = "marlin" if settings.get("is_marlin_format") else first or second or "gptq"
    if found not in ("gptq", "gptq_v2"):
        raise ConfigError(f"quantization_config: checkpoint_format {quote(found)} is not supported; there are 'gptq' and 'gptq_v2'")
    return str(found)
