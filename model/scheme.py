"""How the weights of a checkpoint are stored: float, or int8 with a scale for each output row (A16W8).

Reads and writes the `quantization_config` of config.json in compressed-tensors' form, and its packed int8 layout.
Knows no files and no ranks.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from parallel.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Scheme:
    """What the linears of a checkpoint are stored as."""

    name: str = "none"
    """"none" or "rtn-a16w8": shown in the stats."""
    ignore: tuple[str, ...] = ()
    """Linears, by full name, that stay float."""

    def is_quantized(self, linear: str) -> bool:
        """Whether the linear of this full name (without `.weight`) is stored as int8."""
        return self.name != "none" and linear not in self.ignore


def read_scheme(raw: Mapping[str, Any]) -> Scheme:
    """The scheme that the values of a config.json declare.

    Raises ConfigError for a scheme that is not supported, naming what is.
    """
    quantization = raw.get("quantization_config")
    if not quantization:
        return Scheme()
    method = quantization.get("quant_method")
    if method != "compressed-tensors":
        raise ConfigError(f"quantization_config: quant_method {method!r} is not supported; there is 'compressed-tensors'")
    groups = list(quantization.get("config_groups", {}).values())
    if len(groups) != 1:
        raise ConfigError(f"quantization_config has {len(groups)} config_groups, but only 1 is supported")
    group = groups[0]
    weights = group.get("weights") or {}
    found = {key: weights.get(key) for key in _A16W8}
    found["targets"], found["input_activations"] = group.get("targets"), group.get("input_activations")
    found["format"] = group.get("format") or quantization.get("format")
    found["kv_cache_scheme"] = quantization.get("kv_cache_scheme")
    for key, value in {**_A16W8, **_A16W8_GROUP}.items():
        if found[key] != value:
            raise ConfigError(f"quantization_config: {key} is {found[key]!r}, but only {value!r} is supported (int8 weights, W8A16)")
    ignore = tuple(quantization.get("ignore") or ())
    patterns = [name for name in ignore if name.startswith("re:")]
    if patterns:
        raise ConfigError(f"quantization_config: the pattern {patterns[0]!r} in ignore is not supported; list full names")
    return Scheme("rtn-a16w8", ignore)


_A16W8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
_A16W8_GROUP = {"format": "pack-quantized", "targets": ["Linear"], "input_activations": None, "kv_cache_scheme": None}


def write_scheme(scheme: Scheme) -> dict[str, Any]:
    """The `quantization_config` for config.json, as transformers and vLLM read it."""
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**_A16W8, "group_size": None, "dynamic": False, "observer": "minmax"},
                "input_activations": None,
                "output_activations": None,
            }
        },
        "ignore": list(scheme.ignore),
        "kv_cache_scheme": None,
    }


def pack_int8(weight: torch.Tensor) -> torch.Tensor:
    """int8 [rows, columns] to int32 [rows, ceil(columns / 4)]: value + 128, four a word, lowest byte first."""
    rows, columns = weight.shape
    padded = torch.full((rows, -(-columns // 4) * 4), 128, dtype=torch.uint8)
    padded[:, :columns] = (weight.to(torch.int16) + 128).to(torch.uint8)
    return padded.view(torch.int32)


def unpack_int8(packed: torch.Tensor, columns: int) -> torch.Tensor:
    """The inverse of `pack_int8`."""
    # Adding 128 modulo 256 is flipping the highest bit.
    flipped = packed.view(torch.uint8).bitwise_xor(128).view(torch.int8)
    return flipped if flipped.shape[1] == columns else flipped[:, :columns].contiguous()
