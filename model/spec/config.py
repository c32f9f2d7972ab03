"""The shape of a Llama-family model: one dataclass, read from a Hugging Face config.json.

Knows sizes and constants; no tensors, no files but config.json, no ranks.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from model.spec.quoting import quote
from parallel.errors import ConfigError
from parallel.layout import Layout, plan_layout

PREFILL_TOKENS = 512
"""Tokens in one forward pass: bounds the memory of activations."""
BLOCK_MULTIPLE = 16
"""A block's size is a multiple of this many tokens: kernels read whole tiles of them."""

DEFAULT_BLOCK_SIZE = 16
"""Tokens of a block, MindFormers' and vLLM's: small blocks waste little and share much."""
DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Compute types by the names that users write and PyTorch has, with their bytes."""
_MAX_WHOLE = (1 << 31) - 1
_MAX_SIZES = {
    "hidden_size": 1 << 20,
    "intermediate_size": 1 << 22,
    "num_hidden_layers": 10_000,
    "num_attention_heads": 1 << 14,
    "num_key_value_heads": 1 << 14,
    "head_dim": 1 << 14,
    "vocab_size": 1 << 24,
    "max_position_embeddings": _MAX_WHOLE,
}
"""Ten times what the largest models have, or more: a damaged number is not worked with for hours."""
_MAX_CONFIG_BYTES = 1 << 24


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

    def __post_init__(self) -> None:
        for name in ("factor", "low_freq_factor", "high_freq_factor"):
            _require_number(f"{name} of rope_scaling", getattr(self, name), 1e6)
        _require_whole("original_max_position_embeddings of rope_scaling", self.original_max_position_embeddings, 1, _MAX_WHOLE)
        if self.low_freq_factor >= self.high_freq_factor:
            raise ConfigError(
                f"rope_scaling: low_freq_factor is {self.low_freq_factor}, but it has to be below high_freq_factor, {self.high_freq_factor}"
            )


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
        for name, most in _MAX_SIZES.items():
            _require_whole(name, getattr(self, name), 1, most)
        if self.head_dim % 2:
            raise ConfigError(f"head_dim is {self.head_dim}, but an even number is needed: rotary embedding turns pairs")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"{self.num_attention_heads} query heads cannot share {self.num_key_value_heads} key-value heads: it does not divide"
            )
        _require_number("rms_norm_eps", self.rms_norm_eps, 1)
        _require_number("rope_theta", self.rope_theta, 1e15)
        if not isinstance(self.tie_word_embeddings, bool):
            raise ConfigError(f"tie_word_embeddings is {quote(self.tie_word_embeddings)}, but true or false is needed")
        ids = [
            ("bos_token_id", self.bos_token_id),
            *(("eos_token_id", one) for one in self.eos_token_ids),
            ("pad_token_id", self.pad_token_id),
        ]
        for name, value in ids:
            if value is not None:
                _require_whole(name, value, 0, _MAX_WHOLE)
        if self.dtype not in tuple(DTYPES):
            raise ConfigError(f"dtype {quote(self.dtype)} is unknown; there are {', '.join(DTYPES)}")

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
_REQUIRED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
_ROPE_SCALING = tuple(one.name for one in fields(RopeScaling))


def check_blocks(block_size: int, num_blocks: int | None) -> None:
    """Raise ConfigError for numbers of tokens and blocks that no store can have."""
    if block_size < BLOCK_MULTIPLE or block_size % BLOCK_MULTIPLE:
        raise ConfigError(f"block_size is {block_size}, but has to be a multiple of {BLOCK_MULTIPLE}")
    if num_blocks is not None and num_blocks < 1:
        raise ConfigError(f"num_blocks is {num_blocks}, but has to be at least 1")


def count_blocks(tokens: int, block_size: int) -> int:
    """The least whole number of blocks that holds so many tokens."""
    return -(-tokens // block_size)


def build_config(raw: Mapping[str, Any], source: str = "config.json") -> LlamaConfig:
    """LlamaConfig from the values of a Hugging Face config.json; null is the same as a key that is not there.

    Raises ConfigError for another architecture, a missing key, a value that makes no sense, or a feature that the forward
    pass does not have.
    """
    if raw.get("model_type", "llama") != "llama":
        raise ConfigError(f"{source}: model_type is {quote(raw['model_type'])}, but only 'llama' is supported")
    for key, allowed in _FIXED.items():
        if raw.get(key, allowed[0]) not in allowed:
            raise ConfigError(f"{source}: {key} is {quote(raw[key])}, but only {allowed[0]!r} is supported")
    missing = [key for key in _REQUIRED if raw.get(key) is None]
    if missing:
        raise ConfigError(f"{source} lacks {', '.join(missing)}")
    try:
        return _build_config(raw)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None


def _build_config(raw: Mapping[str, Any]) -> LlamaConfig:
    rope = _read_mapping(raw, "rope_scaling") | _read_mapping(raw, "rope_parameters")
    heads, dtype = raw["num_attention_heads"], _first(raw, "dtype", "torch_dtype", default="float32")
    eos, pad, head_dim = raw.get("eos_token_id", 2), raw.get("pad_token_id"), raw.get("head_dim")
    if type(pad) is int and (pad == -1 or (type(raw["vocab_size"]) is int and pad >= raw["vocab_size"])):
        pad = None  # not a row of the model; the first converters of Llama wrote -1 for none
    return LlamaConfig(
        hidden_size=raw["hidden_size"],
        intermediate_size=raw["intermediate_size"],
        num_hidden_layers=raw["num_hidden_layers"],
        num_attention_heads=heads,
        num_key_value_heads=_first(raw, "num_key_value_heads", default=heads),
        head_dim=_divide(raw["hidden_size"], heads) if head_dim is None else head_dim,
        vocab_size=raw["vocab_size"],
        max_position_embeddings=_first(raw, "max_position_embeddings", default=2048),
        rms_norm_eps=_first(raw, "rms_norm_eps", default=1e-6),
        rope_theta=_first(rope, "rope_theta", default=_first(raw, "rope_theta", default=10000.0)),
        rope_scaling=_build_rope_scaling(rope),
        tie_word_embeddings=_first(raw, "tie_word_embeddings", default=False),
        bos_token_id=raw.get("bos_token_id", 1),
        eos_token_ids=tuple(eos) if isinstance(eos, list) else (() if eos is None else (eos,)),
        pad_token_id=pad,
        dtype=dtype.removeprefix("torch.") if isinstance(dtype, str) else dtype,
    )


def read_config(path: Path) -> dict[str, Any]:
    """The values of a config.json. Raises ConfigError when it is missing, absurdly large or not a JSON object."""
    if not path.is_file():
        raise ConfigError(f"{path} does not exist" if not path.exists() else f"{path} is no file")
    try:
        size = path.stat().st_size
        if size > _MAX_CONFIG_BYTES:
            raise ConfigError(f"{path} has {size} bytes, but settings of at most {_MAX_CONFIG_BYTES} are read: it is another file")
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path} is not JSON: {error}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} holds a {type(raw).__name__}, but a JSON object is needed")
    return raw


def _first(raw: Mapping[str, Any], *keys: str, default: Any) -> Any:
    return next((raw[key] for key in keys if raw.get(key) is not None), default)


def _read_mapping(raw: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = _first(raw, key, default={})
    if not isinstance(value, Mapping):
        raise ConfigError(f"{key} is {quote(value)}, but an object is needed")
    return dict(value)


def _require_whole(name: str, value: Any, least: int, most: int) -> None:
    if type(value) is not int or not least <= value <= most:
        raise ConfigError(f"{name} is {quote(value)}, but a whole number from {least} to {most} is needed")


def _require_number(name: str, value: Any, most: float) -> None:
    if type(value) not in (int, float) or not 0 < value <= most:
        raise ConfigError(f"{name} is {quote(value)}, but a number above 0 and up to {most:g} is needed")


def _divide(hidden: Any, heads: Any) -> int:
    for name, value in (("hidden_size", hidden), ("num_attention_heads", heads)):
        _require_whole(name, value, 1, _MAX_SIZES[name])
    if hidden % heads:
        raise ConfigError(f"hidden_size {hidden} does not divide by num_attention_heads {heads}; give head_dim")
    return int(hidden // heads)


def _build_rope_scaling(rope: Mapping[str, Any]) -> RopeScaling | None:
    kind = _first(rope, "rope_type", "type", default="default")
    if kind == "default":
        return None
    if kind != "llama3":
        raise ConfigError(f"rope_scaling {quote(kind)} is not supported; there are 'default' and 'llama3'")
    missing = [name for name in _ROPE_SCALING if rope.get(name) is None]
    if missing:
        raise ConfigError(f"rope_scaling lacks {', '.join(missing)}, which 'llama3' needs")
    return RopeScaling(**{name: rope[name] for name in _ROPE_SCALING})


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
