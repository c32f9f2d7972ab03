"""The shape of a Llama-family model: one dataclass, read from a Hugging Face config.json."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.spec.config_keys import CAUSAL_ARCHITECTURES, CONFIG_KEYS, OTHER_MODELS
from model.spec.file_kind import describe_file
from model.spec.quoting import quote
from model.spec.rope_scaling import Scaling, build_scaling, read_rope_section
from parallel.errors import ConfigError
from parallel.layout import Layout, plan_layout
from parallel.regular_file import read_text

PREFILL_TOKENS = 512
"""Maximum tokens per forward pass; bounds the activation memory."""
BLOCK_MULTIPLE = 16
"""Block sizes are multiples of this many tokens, since kernels read whole tiles."""

DEFAULT_BLOCK_SIZE = 16
"""Tokens per block, as in MindFormers and vLLM: small blocks waste little memory and share well."""
DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Compute dtypes by their PyTorch and option names, with bytes per element."""
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
"""At least ten times the sizes of the largest models; a corrupt value must not cause hours of work."""
_MAX_CONFIG_BYTES = 1 << 24


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaConfig:
    """Sizes and constants of a Llama-family decoder, with Hugging Face's names."""

    hidden_size: int
    """Width of the residual stream."""
    intermediate_size: int
    """Width of the feed-forward intermediate dimension."""
    num_hidden_layers: int
    """Decoder layers."""
    num_attention_heads: int
    """Query heads."""
    num_key_value_heads: int
    """KV heads; divides the query heads."""
    head_dim: int
    """Width of one head."""
    vocab_size: int
    """Rows of the embedding."""
    max_position_embeddings: int
    """Maximum sequence length in tokens."""
    rms_norm_eps: float
    """Added to the mean square in RMSNorm."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""
    rope_scaling: Scaling | None = None
    """Scaling of the rotary frequencies, if any."""
    tie_word_embeddings: bool = False
    """Whether the output head is the embedding."""
    attention_bias: bool = False
    """Whether the four attention linears have a bias."""
    mlp_bias: bool = False
    """Whether the three feed-forward linears have a bias."""
    bos_token_id: int | None = 1
    """Id prepended to a prompt."""
    eos_token_ids: tuple[int, ...] = (2,)
    """Ids that end a sequence."""
    pad_token_id: int | None = None
    """Padding id."""
    dtype: str = "float32"
    """Dtype of the stored weights: a key of DTYPES."""

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
        for name in ("tie_word_embeddings", "attention_bias", "mlp_bias"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} is {quote(getattr(self, name))}, but true or false is needed")
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
        """Return the layout of this model over ranks."""
        return plan_layout(
            hidden=self.hidden_size,
            intermediate=self.intermediate_size,
            vocab=self.vocab_size,
            num_heads=self.num_attention_heads,
            num_kv_heads=self.num_key_value_heads,
            head_dim=self.head_dim,
        )


_REQUIRED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


def check_blocks(block_size: int, num_blocks: int | None) -> None:
    """Raise ConfigError for an invalid number of blocks or block size."""
    if block_size < BLOCK_MULTIPLE or block_size % BLOCK_MULTIPLE:
        raise ConfigError(f"block_size is {block_size}, but has to be a multiple of {BLOCK_MULTIPLE}")
    if num_blocks is not None and num_blocks < 1:
        raise ConfigError(f"num_blocks is {num_blocks}, but has to be at least 1")


def count_blocks(tokens: int, block_size: int) -> int:
    """Return the number of blocks needed for this many tokens."""
    return -(-tokens // block_size)


def build_config(raw: Mapping[str, Any], source: str = "config.json") -> LlamaConfig:
    """Build a LlamaConfig from the values of a Hugging Face config.json; null equals a missing key.

    Raises ConfigError for another architecture, a missing key, an invalid value, or a feature that the forward pass does not support.
    """
    _check_architecture(raw, source)
    CONFIG_KEYS.check(raw, source)
    missing = [key for key in _REQUIRED if raw.get(key) is None]
    if missing:
        raise ConfigError(f"{source} lacks {', '.join(missing)}")
    try:
        config = _build_config(raw)
        _check_windows(raw, config)
        return config
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None


def _check_architecture(raw: Mapping[str, Any], source: str) -> None:
    kind, architectures = raw.get("model_type", "llama"), raw.get("architectures") or ["LlamaForCausalLM"]
    if kind != "llama":
        what = f" ({OTHER_MODELS[kind]})" if isinstance(kind, str) and kind in OTHER_MODELS else ""
        raise ConfigError(f"{source}: model_type is {quote(kind)}{what}, but only 'llama' is supported")
    names = architectures if isinstance(architectures, list) else [architectures]
    other = next((name for name in names if name not in CAUSAL_ARCHITECTURES), None)
    if other is not None:
        raise ConfigError(f"{source}: architectures names {quote(other)}, but only 'LlamaForCausalLM' is supported")


def _build_config(raw: Mapping[str, Any]) -> LlamaConfig:
    rope, max_positions = read_rope_section(raw), _first(raw, "max_position_embeddings", default=2048)
    heads, dtype = raw["num_attention_heads"], _first(raw, "dtype", "torch_dtype", default="float32")
    eos, pad, head_dim = raw.get("eos_token_id", 2), raw.get("pad_token_id"), raw.get("head_dim")
    if type(pad) is int and (pad == -1 or (type(raw["vocab_size"]) is int and pad >= raw["vocab_size"])):
        pad = None  # not in the vocabulary; early Llama converters wrote -1 for none
    return LlamaConfig(
        hidden_size=raw["hidden_size"],
        intermediate_size=raw["intermediate_size"],
        num_hidden_layers=raw["num_hidden_layers"],
        num_attention_heads=heads,
        num_key_value_heads=_first(raw, "num_key_value_heads", default=heads),
        head_dim=_divide(raw["hidden_size"], heads) if head_dim is None else head_dim,
        vocab_size=raw["vocab_size"],
        max_position_embeddings=max_positions,
        rms_norm_eps=_first(raw, "rms_norm_eps", default=1e-6),
        rope_theta=_first(rope, "rope_theta", default=10000.0),
        rope_scaling=build_scaling(rope, max_positions),
        tie_word_embeddings=_first(raw, "tie_word_embeddings", default=False),
        attention_bias=_first(raw, "attention_bias", default=False),
        mlp_bias=_first(raw, "mlp_bias", default=False),
        bos_token_id=raw.get("bos_token_id", 1),
        eos_token_ids=tuple(eos) if isinstance(eos, list) else (() if eos is None else (eos,)),
        pad_token_id=pad,
        dtype=dtype.removeprefix("torch.") if isinstance(dtype, str) else dtype,
    )


def _check_windows(raw: Mapping[str, Any], config: LlamaConfig) -> None:
    """Raise ConfigError where attention sees a part of the context. transformers cuts its cache there, and vLLM masks it."""
    if raw.get("layer_types"):
        return  # every layer is "full_attention", whatever the window
    for key in ("sliding_window", "attention_chunk_size"):
        value, context = raw.get(key), config.max_position_embeddings
        if value is not None and (type(value) is not int or value < context):
            raise ConfigError(
                f"{key} is {quote(value)}, but max_position_embeddings is {context}: attention over a window is not supported; "
                f"set {key} to null if the model attends to its whole context"
            )


def read_config(path: Path) -> dict[str, Any]:
    """Read the values of a config.json. Raises ConfigError when it is missing, too large or not a JSON object."""
    try:
        raw = json.loads(read_text(path, _MAX_CONFIG_BYTES))
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(f"{path} does not exist") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        words = describe_file(path)
        raise ConfigError(f"{path} {words}" if words else f"{path} is not JSON: {error}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} holds a {type(raw).__name__}, but a JSON object is needed")
    return raw


def _first(raw: Mapping[str, Any], *keys: str, default: Any) -> Any:
    return next((raw[key] for key in keys if raw.get(key) is not None), default)


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
