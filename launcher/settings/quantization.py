"""The `quantization_config` section of a MindFormers YAML, with MindFormers' rules.

Covers names, their valid combinations, and comparison with what a checkpoint declares; reads no files or tensors.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from launcher.settings.yaml_null import is_null
from model.spec.config import LlamaConfig
from model.spec.scheme import Scheme
from model.spec.weights import find_not_converted, linear_names
from parallel.errors import ConfigError

_DTYPES = (None, "int8")
_OUTLIERS = (None, "smooth")
_RULES: dict[str, tuple[tuple[str, ...], tuple[str | None, ...]]] = {
    "ptq": (("A16W8", "A8W8", "C8", "A16W8C8", "A8W8C8"), (None, "smooth")),
    "rtn": (("A16W8", "C8", "A16W8C8"), (None,)),
    "smooth_quant": (("A8W8",), ("smooth",)),
}
"""Maps each method to its combinations (A activations, W weights, C KV cache, each with its bits) and outlier suppression methods."""

_APPROACHES = {"rtn": "rtn-a16w8", "ptq": "ptq", "smooth_quant": "smooth_quant"}
"""Maps each method to its name in `tandem quantize`."""

_FALLBACK = "A16W8"
"""Combination of single linears that Golden Stick's ptq quantizes otherwise."""

_SECTION = "model.model_config.quantization_config"


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizationSettings:
    """How the weights of a checkpoint are quantized, or are to be."""

    quant_method: str
    """'rtn', 'ptq' or 'smooth_quant'."""
    weight_dtype: str | None = None
    """'int8', or None to keep the weights in float."""
    activation_dtype: str | None = None
    """'int8', or None to keep the activations in float."""
    kvcache_dtype: str | None = None
    """'int8', or None to keep the KV cache in float."""
    outliers_suppression: str | None = None
    """'smooth' migrates activation outliers into the weights."""
    modules_to_not_convert: tuple[str, ...] = ()
    """Layers whose name contains one of these stay in float."""
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

    def check_scheme(self, scheme: Scheme, config: LlamaConfig, checkpoint: str, source: str) -> None:
        """Raise ConfigError naming both if a checkpoint's integer types, or the linears they apply to, differ from these settings."""
        wanted = None if self.weight_dtype is None else self.combination.removesuffix("C8")
        found = {f"A{8 if group.linear.activation else 16}W{group.linear.bits}" for group in scheme.groups}
        extra = {_FALLBACK} if self.quant_method == "ptq" else set()
        if (wanted in found and found <= {wanted, *extra}) or (wanted is None and not found):
            self._check_not_converted(scheme, config, checkpoint)
            return
        if not found:
            raise ConfigError(
                f"quantization_config requests {self.quant_method} ({self.combination}), but {checkpoint} holds float weights; "
                f"create an int8 checkpoint with: tandem quantize -c {source} --checkpoint {checkpoint} -a {self.approach}"
            )
        holds = f"{' and '.join(sorted(found))} ({scheme.name})"
        raise ConfigError(
            f"quantization_config requests {self.quant_method} ({self.combination}), but {checkpoint} holds {holds}; "
            "use the YAML of this checkpoint, or remove quantization_config from it"
        )

    def _check_not_converted(self, scheme: Scheme, config: LlamaConfig, checkpoint: str) -> None:
        if not self.modules_to_not_convert or scheme.linear is None:
            return
        wanted = set(find_not_converted(config, self.modules_to_not_convert))
        names = [*linear_names(config), *([] if config.tie_word_embeddings else ["lm_head"])]
        wrong = [name for name in names if scheme.is_quantized(name) == (name in wanted)]
        if wrong:
            stored = "int8 weights" if scheme.is_quantized(wrong[0]) else "float weights"
            raise ConfigError(
                f"{_SECTION}.modules_to_not_convert is {list(self.modules_to_not_convert)}, but {checkpoint} holds {stored} of {wrong[0]}"
                f" ({len(wrong)} of {len(names)} linears differ); use the YAML of this checkpoint, or remove the key from it"
            )

    @property
    def approach(self) -> str:
        """Name of the method in `tandem quantize`."""
        return _APPROACHES[self.quant_method]

    @property
    def combination(self) -> str:
        """Bit widths in Golden Stick's notation: A16W8, A8W8, C8, A16W8C8, ..."""
        bits = {None: 16, "int8": 8}
        cache = "" if self.kvcache_dtype is None else "C8"
        if cache and self.weight_dtype is None and self.activation_dtype is None:
            return cache
        return f"A{bits[self.activation_dtype]}W{bits[self.weight_dtype]}{cache}"


def build_quantization(raw: Mapping[str, Any] | None) -> QuantizationSettings | None:
    """Build the settings from a section accepted by `check_keys`; None if there is no section."""
    if raw is None:
        return None
    said = {key: value for key, value in raw.items() if not is_null(value)}
    if "algorithm_args" in said:
        said["algorithm_args"] = {key: value for key, value in said["algorithm_args"].items() if not is_null(value)}
    if "quant_method" not in said:
        raise ConfigError(f"{_SECTION} lacks quant_method; {_join(tuple(_RULES))} is needed")
    return QuantizationSettings(**{**said, "modules_to_not_convert": tuple(said.get("modules_to_not_convert", ()))})


def _join(words: tuple[str | None, ...]) -> str:
    return " or ".join(repr(word) for word in words)
