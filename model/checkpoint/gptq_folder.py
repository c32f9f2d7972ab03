"""A folder that AutoGPTQ, GPTQModel or transformers wrote: GPTQ weights of 4 or 8 bits, packed along the inputs.

`qweight` is int32 [inputs * bits / 32, outputs], the first input in the lowest bits, so its transpose is `weight_packed` as it
stands. `qzeros` holds each zero point minus 1 (modulo 2^bits), or the zero point itself where `checkpoint_format` is "gptq_v2".
Knows GPTQ's settings and words; `model/checkpoint/column_packed.py` knows the tensors.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from model.checkpoint.column_packed import (
    ColumnFolder,
    ColumnPackedFolder,
    declares_method,
    quantized_linears,
    read_bits,
    read_group_size,
    read_settings,
)
from model.spec.quoting import quote
from model.spec.scheme import LinearScheme, read_flag
from parallel.errors import ConfigError
from parallel.file_slices import FileReader

SETTINGS_FILE = "quantize_config.json"


def is_gptq(path: Path) -> bool:
    """Whether a folder declares GPTQ weights; False for all that cannot be read."""
    return declares_method(path, "gptq", SETTINGS_FILE)


class GptqFolder(ColumnPackedFolder):
    """Opened by its headers and its biases.

    Raises ConfigError for settings that are not supported, CheckpointError for files and tensors that do not fit them.
    """

    def __init__(self, path: Path) -> None:
        folder = ColumnFolder(path)
        settings = read_settings(folder, SETTINGS_FILE)
        linear = _read_linear(settings)
        self._zeros_minus_one = _read_format(settings) == "gptq"
        per_word = 32 // linear.bits
        shapes = {name: (rows, words * per_word) for name, (words, rows) in quantized_linears(folder).items()}
        super().__init__(folder, linear, shapes)

    def _read_weight(self, reader: FileReader, linear: str, start: int, stop: int) -> torch.Tensor:
        # Both sides keep q = integer + 2^(bits - 1), the first input lowest: whole words change place.
        return self._folder.read_columns(reader, f"{linear}.qweight", start, stop).T.contiguous()

    def _order_zero_points(self, words: torch.Tensor) -> torch.Tensor:
        if not self._zeros_minus_one:
            return words
        stored = words.contiguous().view(torch.uint8)
        if self._linear.bits == 8:
            return (stored + 1).view(torch.int32)
        # Adding 16 to the byte is adding 1 to its upper half, and leaves the lower one.
        return (((stored + 1) & 0x0F) | ((stored + 0x10) & 0xF0)).view(torch.int32)


def _read_linear(settings: Mapping[str, Any]) -> LinearScheme:
    dynamic = settings.get("dynamic") or {}
    if not isinstance(dynamic, dict):
        raise ConfigError(f"quantization_config: dynamic is {quote(dynamic)}, but an object is needed")
    changed = [pattern for pattern in dynamic if not pattern.startswith("-")]
    if changed:
        raise ConfigError(f"quantization_config: dynamic gives {len(changed)} kinds of linears their own settings, but only 1 is supported")
    group_size = read_group_size(settings, ("group_size",))
    return LinearScheme(
        bits=read_bits(settings, ("bits",), (4, 8)),
        group_size=group_size,
        symmetric=read_flag(settings, "sym", True),
        # With one group there is nothing to order.
        act_order=read_flag(settings, "desc_act", False) and group_size is not None,
    )


def _read_format(settings: Mapping[str, Any]) -> str:
    found = "marlin" if settings.get("is_marlin_format") else settings.get("checkpoint_format") or "gptq"
    if found not in ("gptq", "gptq_v2"):
        raise ConfigError(f"quantization_config: checkpoint_format {quote(found)} is not supported; there are 'gptq' and 'gptq_v2'")
    return str(found)
