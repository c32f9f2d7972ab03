"""What a quantization does: which linears become integers and how, and what of it is stored.

Knows schemes; no tensors, no files, no command line.
"""

from dataclasses import dataclass, replace

from model.spec.config import LlamaConfig
from model.spec.scheme import LinearScheme, Scheme
from model.spec.weights import find_not_converted, linear_names, linear_shape
from parallel.errors import ConfigError

METHODS = ("rtn", "gptq", "awq")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """One way to quantize a checkpoint."""

    approach: str
    """The user's word for it."""
    linear: LinearScheme | None
    """What linears become; None: they stay float. `smooth` says that smooth scales are stored beside them."""
    kv_cache: str | None = None
    """A kv_cache word of model/spec/scheme.py."""
    method: str = "rtn"
    """How weights are rounded: one of METHODS."""
    smooth: bool = False
    """Move outliers of the activations into the weights."""
    alpha: float = 0.5
    """How far: 0 not at all, 1 wholly."""
    fold: bool = False
    """Divide the norms, or the linears, that make the inputs by the scales, instead of storing these."""
    half_scales: bool = False
    """Weight scales are stored as float16, whatever the weights were."""
    not_converted: tuple[str, ...] = ("lm_head",)
    """A linear whose name contains one of these stays float."""

    def __post_init__(self) -> None:
        if self.linear is None and self.kv_cache is None:
            raise ConfigError(f"{self.approach} quantizes neither weights nor the key-value cache: ask for one of them")
        if self.linear is not None and self.linear.activation == "tensor" and self.linear.activation_symmetric:
            raise ConfigError("static activations are made with zero points only; set activation_symmetric to False")
        if self.method not in METHODS:
            raise ConfigError(f"the method {self.method!r} is unknown; there are {', '.join(METHODS)}")
        if not 0 <= self.alpha <= 1:
            raise ConfigError(f"alpha is {self.alpha}, but has to be from 0 to 1")

    @property
    def needs_samples(self) -> bool:
        """Whether it has to see activations."""
        static = self.linear is not None and self.linear.activation == "tensor"
        return static or self.smooth or self.method != "rtn" or self.kv_cache == "channel"

    def build_scheme(self, config: LlamaConfig) -> Scheme:
        """What the written checkpoint declares. Raises ConfigError where nothing is left or groups do not divide the columns."""
        ignore = find_not_converted(config, self.not_converted)
        if self.linear is None:
            return Scheme(None, (), self.kv_cache)
        scheme = Scheme(replace(self.linear, smooth=self.smooth and not self.fold), ignore, self.kv_cache)
        names = ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")
        if not any(scheme.is_quantized(name) for name in (*linear_names(config), "lm_head")):
            raise ConfigError(f"modules_to_not_convert {list(self.not_converted)} leaves nothing to quantize")
        group = self.linear.group_size
        for name in names:
            columns = linear_shape(config, name)[1]
            if group is not None and columns % group:
                fits = [size for size in (128, 64, 32) if not any(linear_shape(config, other)[1] % size for other in names)]
                advice = f"use --group-size {fits[0]}" if fits else "no usual group size does"
                raise ConfigError(f"{name} has {columns} input channels, which do not divide into groups of {group}; {advice}")
        return scheme
