"""A model family as a value: how its config.json is read, what its layers contain, and what its tensors are called.

Loading, splitting, planning, quantization and the forward pass read the resulting `LlamaConfig`; none of them names a family. A family is
one module of `model/spec/families/` that defines ARCHITECTURE (docs/contributing.md).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from model.spec.key_table import KeyTable
from model.spec.quoting import quote
from parallel.errors import ConfigError

_MAX_EXPERTS, _MAX_WIDTH = 4096, 1 << 22


def keep(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the values as they are."""
    return raw


def read_nothing(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return no further fields."""
    return {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """Feed-forward layers of several experts, of which a router picks some for each token."""

    count: int
    """Experts of a layer."""
    per_token: int
    """Experts that a token runs through."""
    intermediate_size: int
    """Width of one expert's intermediate dimension."""
    normalized: bool = True
    """Whether the weights of the picked experts are divided by their sum."""
    dense_layers: tuple[int, ...] = ()
    """Layers with one feed-forward instead of experts."""

    def __post_init__(self) -> None:
        limits = (
            ("the number of experts", self.count, 2, _MAX_EXPERTS),
            ("num_experts_per_tok", self.per_token, 1, self.count),
            ("the intermediate size of an expert", self.intermediate_size, 1, _MAX_WIDTH),
        )
        for name, value, least, most in limits:
            if type(value) is not int or not least <= value <= most:
                raise ConfigError(f"{name} is {quote(value)}, but a whole number from {least} to {most} is needed")
        if not isinstance(self.normalized, bool):
            raise ConfigError(f"norm_topk_prob is {quote(self.normalized)}, but true or false is needed")


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertNames:
    """Names of a layer's router and experts, relative to the layer; `{}` is the number of the expert."""

    router: str = "mlp.gate"
    gate: str = "mlp.experts.{}.gate_proj"
    up: str = "mlp.experts.{}.up_proj"
    down: str = "mlp.experts.{}.down_proj"


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufNames:
    """How llama.cpp stores the family."""

    architecture: str
    """`general.architecture`."""
    interleaved: bool = False
    """Whether rows of query and key heads are interleaved pairs, as llama.cpp's `llama` has them."""
    layer: Mapping[str, str] = field(default_factory=dict)
    """Further tensors of a layer: llama.cpp's name to the name in the layer."""
    sizes: Mapping[str, str] = field(default_factory=dict)
    """Further keys, without the architecture's prefix, that are read: to the key of config.json. They are required."""
    optional: Mapping[str, str] = field(default_factory=dict)
    """The same for keys that may be missing."""
    values: Mapping[str, Any] = field(default_factory=dict)
    """Further values of config.json, which the file implies."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """One model family."""

    model_type: str
    """Of config.json."""
    class_names: tuple[str, ...]
    """Values of `architectures` for this decoder; the first one is written."""
    keys: KeyTable
    """How each key of config.json is handled."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """transformers' values of missing keys, where they differ from Llama's."""
    features: Mapping[str, Any] = field(default_factory=dict)
    """Fields of LlamaConfig that all models of the family share."""
    read: Callable[[Mapping[str, Any]], dict[str, Any]] = read_nothing
    """Returns further fields of LlamaConfig, given the values of a config.json with defaults. Raises ConfigError."""
    rewrite: Callable[[Mapping[str, Any]], Mapping[str, Any]] = keep
    """Returns the values of a config.json in the form of the other families."""
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Stored linears whose rows are those of several linears of the layer, in order; read as these."""
    stored_as: str | None = None
    """The family whose checkpoints hold the same model unfused: that of every checkpoint that is written."""
    experts: ExpertNames = field(default_factory=ExpertNames)
    """Names of router and experts, if there are any."""
    gguf: GgufNames | None = None
    """None: llama.cpp's files are not read."""
    mindformers: tuple[str, ...] = ()
    """Types of model_config in MindFormers' YAML, then names of its classes."""
