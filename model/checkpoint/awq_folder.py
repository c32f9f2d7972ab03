"""A folder written by AutoAWQ (version GEMM): 4-bit weights, packed along the outputs in AWQ's interleaved order.

`qweight` is int32 [inputs, outputs / 8]; the 8 nibbles of a word, lowest first, are its output rows 0, 2, 4, 6, 1, 3, 5, 7. `qzeros` is
packed the same way and holds the zero points without an offset. `model/checkpoint/column_packed.py` handles the tensors; this module
handles AWQ's settings and bit order.
"""

from __future__ import annotations

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
from model.spec.quantization_keys import AWQ_KEYS
from model.spec.quantization_sections import read_flag
from model.spec.quoting import quote
from parallel.errors import ConfigError
from parallel.file_slices import FileReader
from parallel.lazy_torch import torch

SETTINGS_FILE = "quant_config.json"
_ROWS_A_WORD = 8
_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Output row of each nibble, lowest nibble first."""
_ZERO_WORD = 0x88888888 - (1 << 32)
"""Eight times the integer 0 (stored as 8) as an int32."""
_BLOCK_BYTES = 8 << 20


def is_awq(path: Path) -> bool:
    """Return whether a folder declares AWQ weights; False if it cannot be read."""
    return declares_method(path, "awq", SETTINGS_FILE)


class AwqFolder(ColumnPackedFolder):
    """An AWQ checkpoint; opening it reads the headers and biases.

    Raises ConfigError for unsupported settings, CheckpointError for files and tensors that contradict them.
    """

    def __init__(self, path: Path, *, follow_links: bool = False, find_linear: Callable[[str], LinearScheme] | None = None) -> None:
        """`find_linear`: schemes by name, from settings in another dialect; None: from AWQ's settings."""
        folder = ColumnFolder(path, follow_links=follow_links)
        settings = dict[str, Any]() if find_linear else read_settings(folder, SETTINGS_FILE)
        AWQ_KEYS.check(settings, f"{path}: quantization_config")
        linear = None if find_linear else _read_linear(settings)
        shapes = {name: (words * _ROWS_A_WORD, inputs) for name, (inputs, words) in quantized_linears(folder).items()}
        super().__init__(folder, {name: linear or find_linear(name) for name in shapes}, shapes)  # type: ignore[misc]
        self.notes += tuple(AWQ_KEYS.describe(settings, f"{path}: quantization_config"))

    def _advise_zero_points(self, shifted: set[int], middle: int) -> str:
        return ": the weights are not symmetric; set zero_point to true"

    def _read_weight(self, reader: FileReader, linear: str, start: int, stop: int) -> torch.Tensor:
        first = start // _ROWS_A_WORD
        words = self._folder.read_columns(reader, f"{linear}.qweight", first, -(-stop // _ROWS_A_WORD))
        inputs, num_words = words.shape
        out = torch.empty((num_words * _ROWS_A_WORD, -(-inputs // _ROWS_A_WORD)), dtype=torch.int32)
        step = max(1, _BLOCK_BYTES // (4 * inputs))
        for word in range(0, num_words, step):
            end = min(word + step, num_words)
            out[word * _ROWS_A_WORD : end * _ROWS_A_WORD] = _pack_inputs(words[:, word:end])
        skip = start - first * _ROWS_A_WORD
        return out[skip : skip + stop - start].contiguous()

    def _order_zero_points(self, words: torch.Tensor, bits: int) -> torch.Tensor:
        out = torch.zeros_like(words)
        for nibble, row in enumerate(_ORDER):
            out |= ((words >> (4 * nibble)) & 15) << (4 * row)
        return out


def _pack_inputs(words: torch.Tensor) -> torch.Tensor:
    """Repack int32 [inputs, words] of 8 output rows each to int32 [8 * words, ceil(inputs / 8)] of 8 inputs each."""
    inputs, num_words = words.shape
    padding = -inputs % _ROWS_A_WORD
    if padding:
        words = torch.cat((words, words.new_full((padding, num_words), _ZERO_WORD)))
    stored = words.contiguous().view(torch.uint8).view(-1, num_words, 4)
    even, odd = stored[0::2], stored[1::2]
    pairs = torch.empty((even.shape[0], num_words, _ROWS_A_WORD), dtype=torch.uint8)
    low, high = (even & 0x0F) | (odd << 4), (even >> 4) | (odd & 0xF0)
    for byte in range(4):
        pairs[:, :, _ORDER[2 * byte]] = low[:, :, byte]
        pairs[:, :, _ORDER[2 * byte + 1]] = high[:, :, byte]
    return pairs.flatten(1).T.contiguous().view(torch.int32)


def _read_linear(settings: Mapping[str, Any]) -> LinearScheme:
    version = settings.get("version") or "gemm"
    if not isinstance(version, str) or version.lower() != "gemm":
        raise ConfigError(f"quantization_config: AWQ version {quote(version)} is not supported; only 'gemm' is")
    return LinearScheme(
        bits=read_bits(settings, ("bits", "w_bit"), (4,)),
        group_size=read_group_size(settings, ("group_size", "q_group_size")),
        symmetric=not read_flag(settings, "zero_point", True),
    )
