"""The `quantization_config` section of a MindFormers YAML, with the rules of the original.

Knows words, which of them go together, and what a checkpoint declares; no tensors, no arithmetic, no files.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from launcher.settings.yaml_schema import is_null
from model.spec.scheme import Scheme
from parallel.errors import ConfigError

_DTYPES = (None, "int8")
_OUTLIERS = (None, "smooth")
_RULES: dict[str, tuple[tuple[str, ...], tuple[str | None, ...]]] = {
    "ptq": (("A16W8", "A8W8", "C8", "A16W8C8", "A8W8C8"), (None, "smooth")),
    "rtn": (("A16W8", "C8", "A16W8C8"), (None,)),
    "smooth_quant": (("A8W8",), ("smooth",)),
}
"""Method: its combinations (A activations, W weights, C key-value cache, each with its bits) and its outlier suppressions."""

_APPROACHES = {"rtn": "rtn-a16w8", "ptq": "ptq", "smooth_quant": "smooth_quant"}
"""Method: what `tandem quantize` calls it."""

_SECTION = "model.model_config.quantization_config"


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizationSettings:
    """How the weights of a checkpoint were, or are to be, quantized."""

    quant_method: str
    """'rtn', 'ptq' or 'smooth_quant'."""
    weight_dtype: str | None = None
    """'int8', or None: weights stay as they are."""
    activation_dtype: str | None = None
    """'int8', or None: activations stay as they are."""
    kvcache_dtype: str | None = None
    """'int8', or None: the key-value cache stays as it is."""
    outliers_suppression: str | None = None
    """'smooth': outliers of the activations are moved into the weights."""
    modules_to_not_convert: tuple[str, ...] = ()
    """A layer whose name contains one of these stays as it is."""
    algorithm_args: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the method, such as `alpha` of smooth_quant."""

    def __post_init__(self) -> None:
        words: dict[str, tuple[str | None, ...]] = {
            "quant_method": tuple(_RULES),
            "weight_dtype": _DTYPES,
            "activation_dtype": _DTYPES,
            "kvcache_dtype": _DTYPES,
            "outliers_suppression": _OUTLIERS,
        }
        for key, allowed in words.items():
            if getattr(self, key) not in allowed:
                raise ConfigError(f"{_SECTION}.{key} is {getattr(self, key)!r}, but {_join(allowed)} is needed")
        combinations, outliers = _RULES[self.quant_method]
        if self.combination not in combinations or self.outliers_suppression not in outliers:
            raise ConfigError(
                f"{_SECTION} asks {self.quant_method!r} for {self.combination} with outliers_suppression {self.outliers_suppression!r}"
                f" (weight_dtype {self.weight_dtype!r}, activation_dtype {self.activation_dtype!r}, kvcache_dtype {self.kvcache_dtype!r}),"
                f" but it does {' or '.join(combinations)} with outliers_suppression {_join(outliers)}"
            )

    def check_scheme(self, scheme: Scheme, checkpoint: str, source: str) -> None:
        """Raise ConfigError, naming both, when a checkpoint stores other integers than these settings ask for."""
        wanted = None if self.weight_dtype is None else self.combination.removesuffix("C8")
        linear = scheme.linear
        found = None if linear is None else f"A{8 if linear.activation else 16}W{linear.bits}"
        if wanted == found:
            return
        if found is None:
            raise ConfigError(
                f"quantization_config asks for {self.quant_method} ({self.combination}), but {checkpoint} holds float weights; "
                f"make int8 ones with: tandem quantize -c {source} --checkpoint {checkpoint} -a {self.approach}"
            )
        raise ConfigError(
            f"quantization_config asks for {self.quant_method} ({self.combination}), but {checkpoint} holds {found} ({scheme.name}); "
            "take the YAML of this checkpoint, or remove quantization_config from it"
        )

    @property
    def approach(self) -> str:
        """What `tandem quantize` calls the method."""
        return _APPROACHES[self.quant_method]

    @property
    def combination(self) -> str:
        """Bits in the notation of the original: A16W8, A8W8, C8, A16W8C8 ..."""
        bits = {None: 16, "int8": 8}
        cache = "" if self.kvcache_dtype is None else "C8"
        if cache and self.weight_dtype is None and self.activation_dtype is None:
            return cache
        return f"A{bits[self.activation_dtype]}W{bits[self.weight_dtype]}{cache}"


def build_quantization(raw: Mapping[str, Any] | None) -> QuantizationSettings | None:
    """The settings of a section that `check_keys` has accepted; None where there is none."""
    if raw is None:
        return None
    said = {key: value for key, value in raw.items() if not is_null(value)}
    if "quant_method" not in said:
        raise ConfigError(f"{_SECTION} lacks quant_method; {_join(tuple(_RULES))} is needed")
    return QuantizationSettings(**{**said, "modules_to_not_convert": tuple(said.get("modules_to_not_convert", ()))})


def _join(words: tuple[str | None, ...]) -> str:
    return " or ".join(repr(word) for word in words)
