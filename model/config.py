"""The shape of a Llama-family model: one dataclass, read from a Hugging Face config.json.

Knows sizes and constants; no tensors, no files but config.json, no ranks.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parallel.errors import ConfigError
from parallel.layout import Layout, plan_layout

PREFILL_TOKENS = 512
"""Prompt tokens in one forward pass: bounds the memory of activations."""
DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Compute types by the names that users write and PyTorch has, with their bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """The llama3 frequency scaling (`rope_scaling` with `rope_type: llama3`)."""

    factor: float
    """Wavelengths beyond the old context are stretched by this."""
    low_freq_factor: float
    """Old context over this: the wavelength above which the full stretch applies."""
    high_freq_factor: float
    """Old context over this: the wavelength below which nothing changes."""
    original_max_position_embeddings: int
    """The old context, tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaConfig:
    """Sizes and constants of a Llama-family decoder, in Hugging Face's names."""

    hidden_size: int
    """Width of the residual stream."""
    intermediate_size: int
    """Inner width of the feed-forward."""
    num_hidden_layers: int
    """Decoder layers."""
    num_attention_heads: int
    """Query heads."""
    num_key_value_heads: int
    """Key-value heads; divides the query heads."""
    head_dim: int
    """Width of one head."""
    vocab_size: int
    """Rows of the embedding."""
    max_position_embeddings: int
    """Longest sequence, tokens."""
    rms_norm_eps: float
    """Added to the mean square in RMSNorm."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""
    rope_scaling: RopeScaling | None = None
    """llama3 frequency scaling, if any."""
    tie_word_embeddings: bool = False
    """The output head is the embedding."""
    bos_token_id: int | None = 1
    """Id put before a prompt."""
    eos_token_ids: tuple[int, ...] = (2,)
    """Ids that end a sequence."""
    pad_token_id: int | None = None
    """Id that fills rows of unequal length."""
    dtype: str = "float32"
    """Type of the stored weights: a key of DTYPES."""

    def __post_init__(self) -> None:
        sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
        for name in (*sizes, "head_dim", "vocab_size", "max_position_embeddings"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name} is {value!r}, but a whole number of at least 1 is needed")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"{self.num_attention_heads} query heads cannot share {self.num_key_value_heads} key-value heads: it does not divide"
            )
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype {self.dtype!r} is unknown; there are {', '.join(DTYPES)}")

    def layout(self) -> Layout:
        """How this model splits over ranks."""
        return plan_layout(
            hidden=self.hidden_size,
            intermediate=self.intermediate_size,
            vocab=self.vocab_size,
            num_heads=self.num_attention_heads,
            num_kv_heads=self.num_key_value_heads,
            head_dim=self.head_dim,
        )


_FIXED = {"hidden_act": ("silu",), "attention_bias": (False,), "mlp_bias": (False,)}
"""Keys of config.json that the forward pass takes for granted."""


def build_config(raw: Mapping[str, Any], source: str = "config.json") -> LlamaConfig:
    """LlamaConfig from the values of a Hugging Face config.json.

    Raises ConfigError for another architecture, a missing key, or a feature that the forward pass does not have.
    """
    if raw.get("model_type", "llama") != "llama":
        raise ConfigError(f"{source}: model_type is {raw['model_type']!r}, but only 'llama' is supported")
    for key, allowed in _FIXED.items():
        if raw.get(key, allowed[0]) not in allowed:
            raise ConfigError(f"{source}: {key} is {raw[key]!r}, but only {allowed[0]!r} is supported")
    missing = [k for k in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size") if k not in raw]
    if missing:
        raise ConfigError(f"{source} lacks {', '.join(missing)}")
    rope = {**(raw.get("rope_scaling") or {}), **(raw.get("rope_parameters") or {})}
    eos = raw.get("eos_token_id", 2)
    heads = raw["num_attention_heads"]
    return LlamaConfig(
        hidden_size=raw["hidden_size"],
        intermediate_size=raw["intermediate_size"],
        num_hidden_layers=raw["num_hidden_layers"],
        num_attention_heads=heads,
        num_key_value_heads=raw.get("num_key_value_heads") or heads,
        head_dim=raw.get("head_dim") or _divide(raw["hidden_size"], heads, source),
        vocab_size=raw["vocab_size"],
        max_position_embeddings=raw.get("max_position_embeddings", 2048),
        rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
        rope_theta=float(rope.get("rope_theta", raw.get("rope_theta") or 10000.0)),
        rope_scaling=_build_rope_scaling(rope, source),
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
        bos_token_id=raw.get("bos_token_id", 1),
        eos_token_ids=tuple(eos) if isinstance(eos, list) else (() if eos is None else (eos,)),
        pad_token_id=raw.get("pad_token_id"),
        dtype=str(raw.get("dtype") or raw.get("torch_dtype") or "float32").removeprefix("torch."),
    )


def read_config(path: Path) -> dict[str, Any]:
    """The values of a config.json. Raises ConfigError when it is missing or not a JSON object."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not JSON: {error}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} holds a {type(raw).__name__}, but a JSON object is needed")
    return raw


def _divide(hidden: Any, heads: Any, source: str) -> int:
    if not isinstance(hidden, int) or not isinstance(heads, int) or heads < 1 or hidden % heads:
        raise ConfigError(f"{source}: hidden_size {hidden} does not divide by num_attention_heads {heads}; give head_dim")
    return hidden // heads


def _build_rope_scaling(rope: Mapping[str, Any], source: str) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise ConfigError(f"{source}: rope_scaling {kind!r} is not supported; there are 'default' and 'llama3'")
    return RopeScaling(
        factor=float(rope["factor"]),
        low_freq_factor=float(rope["low_freq_factor"]),
        high_freq_factor=float(rope["high_freq_factor"]),
        original_max_position_embeddings=int(rope["original_max_position_embeddings"]),
    )


def scale_frequency(frequency: float, scaling: RopeScaling | None) -> float:
    """One rotary frequency after the llama3 scaling (Llama 3.1, `apply_scaling`)."""
    if scaling is None:
        return frequency
    wavelength = 2 * math.pi / frequency
    ratio = scaling.original_max_position_embeddings / wavelength
    if ratio < scaling.low_freq_factor:
        return frequency / scaling.factor
    if ratio > scaling.high_freq_factor:
        return frequency
    smooth = (ratio - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    return (1 - smooth) * frequency / scaling.factor + smooth * frequency
