"""The shape of a decoder of any family: one dataclass, read from a Hugging Face config.json."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.spec.architecture import Architecture, Experts
from model.spec.config_keys import OTHER_MODELS
from model.spec.families import list_architectures
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


ACTIVATIONS: Mapping[str, str] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}
"""By the values of `hidden_act`: x * sigmoid(x), and the tanh approximation of GELU."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaConfig:
    """Sizes and constants of a decoder, with Hugging Face's names; the features of all families, which `build_config` sets."""

    model_type: str = "llama"
    """The family: a key of `list_architectures`."""

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
    """Whether the projections of queries, keys and values have a bias."""
    output_bias: bool = False
    """Whether the output projection of the attention has a bias."""
    mlp_bias: bool = False
    """Whether the three feed-forward linears have a bias."""
    qk_norm: bool = False
    """Whether each head of queries and keys is normalized before its rotation."""
    sliding_window: int | None = None
    """A token attends to itself and to the tokens before it, this many in all; None: to all."""
    full_attention_layers: tuple[int, ...] = ()
    """Layers without the window."""
    norm_offset: bool = False
    """Whether 1 is added to the stored weights of norms."""
    sandwich_norms: bool = False
    """Whether the outputs of attention and feed-forward are normalized too."""
    embedding_scale: float = 1.0
    """Multiplier of the embeddings."""
    query_scale: float = 1.0
    """Multiplier of the queries, besides 1 / sqrt(head_dim)."""
    attention_softcap: float | None = None
    """Limit of attention scores: score = limit * tanh(score / limit)."""
    logit_softcap: float | None = None
    """The same for logits."""
    local_rope_theta: float | None = None
    """Base of the rotary frequencies in layers with a window, which are not scaled; None: those of the other layers."""
    hidden_act: str = "silu"
    """Activation of the feed-forward: a value of ACTIVATIONS."""
    experts: Experts | None = None
    """Experts of the feed-forward layers; None: there is one feed-forward a layer."""
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
        for name in ("embedding_scale", "query_scale", "attention_softcap", "logit_softcap", "local_rope_theta"):
            if getattr(self, name) is not None:
                _require_number(name, getattr(self, name), 1e15)
        for name in ("tie_word_embeddings", "attention_bias", "output_bias", "mlp_bias", "qk_norm", "norm_offset", "sandwich_norms"):
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
        if self.sliding_window is not None:
            _require_whole("sliding_window", self.sliding_window, 1, _MAX_WHOLE)
        if self.hidden_act not in ACTIVATIONS.values():
            raise ConfigError(f"hidden_act {quote(self.hidden_act)} is not supported; there are {', '.join(ACTIVATIONS)}")
        if self.dtype not in tuple(DTYPES):
            raise ConfigError(f"dtype {quote(self.dtype)} is unknown; there are {', '.join(DTYPES)}")

    @property
    def architecture(self) -> Architecture:
        """The family."""
        return list_architectures()[self.model_type]

    def has_experts(self, layer: int) -> bool:
        """Return whether the feed-forward of a layer consists of experts."""
        return self.experts is not None and layer not in self.experts.dense_layers

    def find_window(self, layer: int) -> int | None:
        """Return the window of a layer's attention in tokens; None if it sees the whole context."""
        window = None if layer in self.full_attention_layers else self.sliding_window
        return None if window is None or window >= self.max_position_embeddings else window

    def layout(self) -> Layout:
        """Return the layout of this model over ranks."""
        return plan_layout(
            hidden=self.hidden_size,
            intermediate=self.intermediate_size,
            vocab=self.vocab_size,
            num_heads=self.num_attention_heads,
            num_kv_heads=self.num_key_value_heads,
            head_dim=self.head_dim,
            experts=None if self.experts is None else self.experts.intermediate_size,
        )


_MEANS_NONE = (
    "attn_logit_softcapping",
    "bos_token_id",
    "eos_token_id",
    "final_logit_softcapping",
    "num_key_value_heads",
    "pad_token_id",
    "sliding_window",
)
"""Keys whose null is a value."""
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

    Raises ConfigError for an unknown family, a missing key, an invalid value, or a feature that the forward pass does not support.
    """
    family = find_architecture(raw, source)
    family.keys.check(raw, source)
    missing = [key for key in _REQUIRED if raw.get(key) is None]
    if missing:
        raise ConfigError(f"{source} lacks {', '.join(missing)}")
    try:
        return _build_config(raw, family)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None


def find_architecture(raw: Mapping[str, Any], source: str) -> Architecture:
    """Return the family of a config.json. Raises ConfigError for an unknown one, listing the known ones."""
    families = list_architectures()
    kind = raw.get("model_type", "llama")
    if not isinstance(kind, str) or kind not in families:
        what = f" ({OTHER_MODELS[kind]})" if isinstance(kind, str) and kind in OTHER_MODELS else ""
        raise ConfigError(f"{source}: model_type is {quote(kind)}{what}, but only {', '.join(map(repr, families))} are supported")
    family = families[kind]
    found = raw.get("architectures") or [family.class_names[0]]
    names = found if isinstance(found, list) else [found]
    other = next((name for name in names if name not in family.class_names), None)
    if other is not None:
        raise ConfigError(
            f"{source}: architectures names {quote(other)}, but only {family.class_names[0]!r} is supported with model_type {kind!r}"
        )
    return family


def _build_config(raw: Mapping[str, Any], family: Architecture) -> LlamaConfig:
    theta = family.defaults.get("rope_theta", 10000.0)
    defaults = {key: value for key, value in family.defaults.items() if key != "rope_theta"}
    raw = family.rewrite(raw)
    raw = {**defaults, **{key: value for key, value in raw.items() if value is not None or key in _MEANS_NONE}}
    rope, max_positions = read_rope_section(raw), _first(raw, "max_position_embeddings", default=2048)
    heads, dtype = raw["num_attention_heads"], _first(raw, "dtype", "torch_dtype", default="float32")
    eos, pad, head_dim = raw.get("eos_token_id", 2), raw.get("pad_token_id"), raw.get("head_dim")
    if type(pad) is int and (pad == -1 or (type(raw["vocab_size"]) is int and pad >= raw["vocab_size"])):
        pad = None  # not in the vocabulary; early Llama converters wrote -1 for none
    return LlamaConfig(
        model_type=family.model_type,
        hidden_size=raw["hidden_size"],
        intermediate_size=raw["intermediate_size"],
        num_hidden_layers=raw["num_hidden_layers"],
        num_attention_heads=heads,
        num_key_value_heads=_first(raw, "num_key_value_heads", default=heads),
        head_dim=_divide(raw["hidden_size"], heads) if head_dim is None else head_dim,
        vocab_size=raw["vocab_size"],
        max_position_embeddings=max_positions,
        rms_norm_eps=_first(raw, "rms_norm_eps", default=1e-6),
        rope_theta=_first(rope, "rope_theta", default=theta),
        rope_scaling=build_scaling(rope, max_positions),
        tie_word_embeddings=_first(raw, "tie_word_embeddings", default=False),
        bos_token_id=raw.get("bos_token_id", 1),
        eos_token_ids=tuple(eos) if isinstance(eos, list) else (() if eos is None else (eos,)),
        pad_token_id=pad,
        dtype=dtype.removeprefix("torch.") if isinstance(dtype, str) else dtype,
        **{**family.features, **family.read(raw)},
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
