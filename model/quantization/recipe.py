"""A quantization recipe: which linears are quantized and how, and what is stored."""

from dataclasses import dataclass, replace

from model.spec.config import LlamaConfig
from model.spec.linear_scheme import LinearGroup, LinearScheme
from model.spec.scheme import Scheme
from model.spec.weights import find_not_converted, linear_names, linear_shape
from parallel.errors import ConfigError

METHODS = ("rtn", "gptq", "awq")
_HEAD = LinearScheme()


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """One way to quantize a checkpoint."""

    approach: str
    """The approach as named by the user."""
    linear: LinearScheme | None
    """Target scheme of linears; None: they stay float. Its `smooth` means that smooth scales are stored."""
    kv_cache: str | None = None
    """A kv_cache type of model/spec/scheme.py."""
    method: str = "rtn"
    """Rounding method: one of METHODS."""
    smooth: bool = False
    """Whether to move outliers of the activations into the weights."""
    alpha: float = 0.5
    """Strength of smoothing: 0 none, 1 full."""
    fold: bool = False
    """Whether to fold the scales into the preceding norms or linears instead of storing them."""
    half_scales: bool = False
    """Whether weight scales are stored as float16, regardless of the weights' dtype."""
    not_converted: tuple[str, ...] = ("lm_head",)
    """Linears whose names contain one of these stay float."""
    int8_head: bool = False
    """Whether the output head is stored as 8-bit integers with a scale per row, whatever `linear` and `not_converted` say."""

    def __post_init__(self) -> None:
        if self.linear is None and self.kv_cache is None:
            raise ConfigError(f"{self.approach} quantizes neither weights nor the key-value cache: ask for one of them")
        if self.linear is not None and self.linear.activation == "tensor" and self.linear.activation_symmetric:
            raise ConfigError("static activations are made with zero points only; set activation_symmetric to False")
        if self.int8_head and self.linear is None:
            raise ConfigError(f"--lm-head is int8, but {self.approach} stores no integer weights: quantize the linears too, or drop it")
        if self.method not in METHODS:
            raise ConfigError(f"the method {self.method!r} is unknown; there are {', '.join(METHODS)}")
        if not 0 <= self.alpha <= 1:
            raise ConfigError(f"alpha is {self.alpha}, but has to be from 0 to 1")

    @property
    def needs_samples(self) -> bool:
        """Whether it needs to observe activations."""
        static = self.linear is not None and self.linear.activation == "tensor"
        return static or self.smooth or self.method != "rtn" or self.kv_cache == "channel"

    def build_scheme(self, config: LlamaConfig) -> Scheme:
        """Return the scheme of the output checkpoint. Raises ConfigError if no linear is left or groups do not divide the columns."""
        ignore = find_not_converted(config, self.not_converted)
        if self.linear is None:
            return Scheme(None, (), self.kv_cache)
        scheme = Scheme(replace(self.linear, smooth=self.smooth and not self.fold), ignore, self.kv_cache)
        if self.int8_head:
            others = () if scheme.linear == _HEAD else (LinearGroup(("lm_head",), _HEAD),)
            scheme = replace(scheme, ignore=tuple(name for name in ignore if name != "lm_head"), others=others)
        if not any(scheme.is_quantized(name) for name in (*linear_names(config), "lm_head")):
            raise ConfigError(f"modules_to_not_convert {list(self.not_converted)} leaves nothing to quantize")
        group = self.linear.group_size
        widths: dict[int, str] = {}
        for full in linear_names(config) if group is not None else ():
            name = full.split(".", 3)[-1]
            widths.setdefault(linear_shape(config, name)[1], name)
        for columns, name in widths.items():
            if group is not None and columns % group:
                fits = [size for size in (128, 64, 32) if not any(other % size for other in widths)]
                advice = f"use --group-size {fits[0]}" if fits else "no usual group size does"
                raise ConfigError(f"{name} has {columns} input channels, which do not divide into groups of {group}; {advice}")
        return scheme
