"""Rotary frequencies and their scaling, equivalent to transformers' ROPE_INIT_FUNCTIONS for Llama.

Depends on the keys `rope_scaling`, `rope_parameters` and `rope_theta` of config.json; does not need torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from model.spec.quoting import quote
from parallel.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

MAX_TOKENS = (1 << 31) - 1
"""Maximum context that a config may specify."""
_MAX_FACTOR = 1e6


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """`rope_type: llama3`: long wavelengths are stretched, short ones kept, those between interpolated."""

    factor: float
    """Stretch of the longest wavelengths."""
    low_freq_factor: float
    """Original context divided by this: the wavelength above which the full stretch applies."""
    high_freq_factor: float
    """Original context divided by this: the wavelength below which nothing changes."""
    original_max_position_embeddings: int
    """The original context, tokens."""

    def __post_init__(self) -> None:
        _require_numbers(self, "factor", "low_freq_factor", "high_freq_factor")
        _require_context(self.original_max_position_embeddings)
        if self.low_freq_factor >= self.high_freq_factor:
            raise ConfigError(
                f"rope_scaling: low_freq_factor is {self.low_freq_factor}, but it has to be below high_freq_factor, {self.high_freq_factor}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearScaling:
    """`rope_type: linear`: every frequency is divided by the factor."""

    factor: float
    """Stretch of the positions."""

    def __post_init__(self) -> None:
        _require_numbers(self, "factor")


@dataclass(frozen=True, slots=True, kw_only=True)
class YarnScaling:
    """`rope_type: yarn`: a ramp between original and divided frequencies, and a factor for cosine and sine."""

    factor: float
    """Stretch of slow frequencies."""
    original_max_position_embeddings: int
    """The original context, tokens."""
    beta_fast: float = 32.0
    """Rotations over the original context above which a frequency is kept."""
    beta_slow: float = 1.0
    """Rotations over the original context below which a frequency is divided by the factor."""
    attention_factor: float = 1.0
    """Multiplier of cosine and sine."""
    truncate: bool = True
    """Whether the ends of the ramp are rounded to whole numbers."""

    def __post_init__(self) -> None:
        _require_numbers(self, "factor", "beta_fast", "beta_slow", "attention_factor")
        _require_context(self.original_max_position_embeddings)
        if not isinstance(self.truncate, bool):
            raise ConfigError(f"truncate of rope_scaling is {quote(self.truncate)}, but true or false is needed")


Scaling = RopeScaling | LinearScaling | YarnScaling
_LLAMA3 = tuple(one.name for one in fields(RopeScaling))
READ_KEYS: Mapping[str, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    # Frequencies change only beyond max_position_embeddings, which no sequence exceeds.
    "dynamic": frozenset({"factor", "original_max_position_embeddings"}),
    "llama3": frozenset(_LLAMA3),
    "yarn": frozenset(
        {"factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate"}
    ),
}
"""Keys of `rope_scaling` that are read, by its `rope_type`."""
_ALWAYS_READ = frozenset({"rope_type", "type", "rope_theta", "partial_rotary_factor", "finetuned"})
"""`finetuned` (YaRN's authors) describes the training and has no effect."""


def read_rope_section(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Merge `rope_scaling` and `rope_parameters` of a config.json into one section with `rope_type` and `rope_theta`.

    Raises ConfigError if the two, or a key and its copy at the top level, contradict each other.
    """
    old, new = _read_mapping(raw, "rope_scaling"), _read_mapping(raw, "rope_parameters")
    for section in (old, new):
        kind = section.pop("type", None)
        if kind is not None and section.setdefault("rope_type", kind) != kind:
            raise ConfigError(f"rope_scaling names rope_type {quote(section['rope_type'])} and type {quote(kind)}: remove the wrong one")
    merged = {**old, **new}
    for key in merged.keys() & old.keys():
        _require_same(f"{key} of rope_scaling", old[key], f"{key} of rope_parameters", merged[key])
    if old and new and (old.get("rope_type") or "default") != (new.get("rope_type") or "default"):
        kinds = [quote(section.get("rope_type") or "default") for section in (old, new)]
        raise ConfigError(f"rope_scaling is of rope_type {kinds[0]}, but rope_parameters of {kinds[1]}: remove the wrong one")
    for key in ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings"):
        if raw.get(key) is not None:
            _require_same(key, raw[key], f"{key} of rope_parameters", merged.get(key))
            merged[key] = raw[key]
    merged["rope_type"] = merged.get("rope_type") or "default"
    if merged.get("partial_rotary_factor") not in (None, 1):
        raise ConfigError(f"partial_rotary_factor is {quote(merged['partial_rotary_factor'])}, but only 1.0 is supported")
    return merged


def build_scaling(section: Mapping[str, Any], max_positions: Any) -> Scaling | None:
    """Build the scaling described by a section of `read_rope_section`; None for unscaled frequencies.

    `max_positions`: max_position_embeddings, the default of the original context. Raises ConfigError for an unsupported rope_type, and
    for missing, unknown or invalid keys.
    """
    kind = section["rope_type"]
    if not isinstance(kind, str) or kind not in READ_KEYS:
        known = ", ".join(map(repr, READ_KEYS))
        raise ConfigError(f"rope_scaling {quote(kind)} is not supported; supported: {known}")
    values = {key: value for key, value in section.items() if value is not None and key not in _ALWAYS_READ}
    unknown = sorted(values.keys() - READ_KEYS[kind] - {"original_max_position_embeddings"})
    if unknown:
        raise ConfigError(f"rope_scaling {quote(kind)} has the unknown key {quote(unknown[0])}: remove it if it changes nothing")
    if kind == "default":
        return None
    needed = _LLAMA3 if kind == "llama3" else ("factor",)
    missing = [name for name in needed if name not in values]
    if missing:
        raise ConfigError(f"rope_scaling lacks {', '.join(missing)}, which {kind!r} needs")
    if kind == "llama3":
        return RopeScaling(**values)
    scaling = LinearScaling(factor=values["factor"])
    if kind == "linear":
        return scaling
    if kind == "dynamic":
        original = values.get("original_max_position_embeddings", max_positions)
        _require_same("max_position_embeddings", max_positions, "original_max_position_embeddings of rope_scaling 'dynamic'", original)
        return None
    return _build_yarn(values, max_positions)


def compute_frequencies(theta: float, width: int, scaling: Scaling | None) -> npt.NDArray[np.float32]:
    """Return float32 [width / 2]: radians per position of each rotary pair of a head of this width."""
    import numpy as np  # not where a config is only read: the import takes a third of a refusal

    exponents = np.arange(0, width, 2, dtype=np.float32) / np.float32(width)
    frequencies = (1.0 / np.power(np.float32(theta), exponents)).astype(np.float32)
    if isinstance(scaling, LinearScaling):
        return np.asarray(frequencies / np.float32(scaling.factor), dtype=np.float32)
    if isinstance(scaling, YarnScaling):
        kept = 1 - _ramp(scaling, theta, width)
        return np.asarray(frequencies / np.float32(scaling.factor) * (1 - kept) + frequencies * kept, dtype=np.float32)
    return np.array([scale_frequency(float(f), scaling) for f in frequencies], dtype=np.float32)


def attention_factor(scaling: Scaling | None) -> float:
    """Return the multiplier of cosine and sine."""
    return scaling.attention_factor if isinstance(scaling, YarnScaling) else 1.0


def scale_frequency(frequency: float, scaling: RopeScaling | None) -> float:
    """Apply the llama3 scaling to one rotary frequency (Llama 3.1, `apply_scaling`)."""
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


def _build_yarn(values: dict[str, Any], max_positions: Any) -> YarnScaling:
    scales = {key: values.pop(key, 0) for key in ("mscale", "mscale_all_dim")}
    for key, value in scales.items():
        if type(value) not in (int, float) or not 0 <= value <= _MAX_FACTOR:
            raise ConfigError(f"{key} of rope_scaling is {quote(value)}, but a number from 0 to {_MAX_FACTOR:g} is needed")
    scaling = YarnScaling(**{"original_max_position_embeddings": max_positions, **values})
    if "attention_factor" in values:
        return scaling
    factor, (numerator, denominator) = scaling.factor, scales.values()
    found = _scale_attention(factor, 1.0)
    if numerator and denominator:
        found = _scale_attention(factor, numerator) / _scale_attention(factor, denominator)
    return YarnScaling(**{"original_max_position_embeddings": max_positions, **values}, attention_factor=found)


def _scale_attention(factor: float, scale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def _ramp(scaling: YarnScaling, theta: float, width: int) -> npt.NDArray[np.float32]:
    """Return float32 [width / 2]: 0 where a frequency is kept, 1 where it is divided."""

    def find_dimension(rotations: float) -> float:
        return width * math.log(scaling.original_max_position_embeddings / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = find_dimension(scaling.beta_fast), find_dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    if low == high:
        high += 0.001
    import numpy as np

    positions = np.arange(width // 2, dtype=np.float32)
    return np.asarray(np.clip((positions - np.float32(low)) / np.float32(high - low), 0, 1), dtype=np.float32)


def _require_same(name: str, value: Any, other: str, second: Any) -> None:
    if value is not None and second is not None and value != second:
        raise ConfigError(f"{name} is {quote(value)}, but {other} is {quote(second)}: remove the wrong one")


def _read_mapping(raw: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = raw.get(key)
    if value is not None and not isinstance(value, Mapping):
        raise ConfigError(f"{key} is {quote(value)}, but an object is needed")
    return dict(value or {})


def _require_numbers(scaling: Scaling, *names: str) -> None:
    for name in names:
        value = getattr(scaling, name)
        if type(value) not in (int, float) or not 0 < value <= _MAX_FACTOR:
            raise ConfigError(f"{name} of rope_scaling is {quote(value)}, but a number above 0 and up to {_MAX_FACTOR:g} is needed")


def _require_context(value: Any) -> None:
    if type(value) is not int or not 1 <= value <= MAX_TOKENS:
        raise ConfigError(
            f"original_max_position_embeddings of rope_scaling is {quote(value)}, but a whole number from 1 to {MAX_TOKENS} is needed"
        )
