"""How the weights of a checkpoint are stored (float, or integers with scales), and the quantization of activations and KV cache.

Reads and writes the `quantization_config` of config.json in the format of compressed-tensors, extended for features of Golden Stick that
it cannot express: formats `smooth-…` (a divisor per input channel of each linear), and a separate key for int8 KV caches with a scale
per channel or token. All readers expose these names, whatever the names in their format. X is a linear:

    X.weight             int8 [rows, columns]                      format int-quantized
    X.weight             float8_e4m3fn [rows, columns]             format float-quantized
    X.weight_packed      int32 [rows, ceil(columns * bits / 32)]   format pack-quantized, see model/spec/packing.py
    X.weight_shape       int64 [2]                                 pack-quantized only
    X.weight_scale       float [rows, groups]; one group if there is no group_size; FP8: [1] for all rows, or a row per block of rows
    X.weight_zero_point  int32 [ceil(rows * bits / 32), groups]    pack-quantized, asymmetric; packed along the rows
    X.weight_g_idx       int32 [columns]                           group of each column, act-order only
    X.input_scale        float [1]                                 static activations
    X.input_zero_point   int8 [1]                                  static activations, asymmetric
    X.smooth_scale       float [columns]                           formats smooth-…: divisor of the inputs
    A.k_scale, A.v_scale float [1] or [KV rows]                    static int8 cache; A is the layer's self_attn

    weight = (integer - zero point) * scale;   input = round(x / (smooth * input_scale) + zero point);   FP8: weight = float8 * scale
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from model.spec.quantization_keys import ARGUMENT_KEYS, COMPRESSED_KEYS, GROUP_KEYS, SUPPORTED_METHODS
from model.spec.quoting import quote
from parallel.errors import ConfigError

SMOOTH = "smooth-"
"""Prefix of the formats with smooth scales. Other programs do not support it, and so cannot load them by mistake."""
KV_CACHE_KEY = "kv_cache_quantization"
"""Key of config.json for int8 caches that compressed-tensors cannot express."""
_FORMATS = {"pack-quantized": True, "int-quantized": False, "float-quantized": False, "naive-quantized": False}
"""Whether the format packs integers into words."""
_ACT_ORDER = {"group": True, "dynamic": True, "weight": False, "static": False}
"""compressed-tensors' values, and whether the columns of a group may then be anywhere."""
_ALL_LINEARS = ("Linear",)
_MAX_GROUP = (1 << 31) - 1
_MAX_PATTERN, _MAX_REPEATS = 200, 4
"""Larger patterns could take hours to match a single name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearScheme:
    """Storage and arithmetic of a checkpoint's quantized linears."""

    bits: int = 8
    """Bits per weight: 4 or 8."""
    group_size: int | None = None
    """Columns that share a scale; None: the whole row."""
    symmetric: bool = True
    """Whether weight zero points are 0 and not stored."""
    packed: bool = True
    """Whether integers are packed in int32 words."""
    act_order: bool = False
    """Whether the columns of a group may be anywhere, as given by `weight_g_idx`."""
    activation: str | None = None
    """None: float; "token": int8 with a scale per row; "tensor": int8 with a stored scale."""
    activation_symmetric: bool = True
    """Whether zero points of static activations are 0 and not stored."""
    smooth: bool = False
    """Whether inputs are divided by a stored vector first."""
    float8: bool = False
    """Whether weights are float8_e4m3fn instead of integers."""
    row_block: int | None = 1
    """FP8: output rows that share a scale; None: all."""

    def __post_init__(self) -> None:
        if type(self.bits) is not int or self.bits not in (4, 8):
            raise ConfigError(f"quantization_config: weights of {quote(self.bits)} bits are not supported; there are 4 and 8")
        if self.group_size is not None and (type(self.group_size) is not int or not 0 < self.group_size <= _MAX_GROUP):
            raise ConfigError(
                f"quantization_config: group_size is {quote(self.group_size)}, but a whole number from 1 to {_MAX_GROUP} is needed"
            )
        if self.activation is not None and (self.bits != 8 or self.group_size is not None or not self.symmetric):
            raise ConfigError("quantization_config: int8 activations need symmetric 8-bit weights with one scale an output row")
        if self.activation == "token" and not self.activation_symmetric:
            raise ConfigError("quantization_config: dynamic int8 activations with zero points are not supported; symmetric ones are")
        if self.float8 and (self.bits != 8 or self.packed or not self.symmetric or self.act_order or self.activation or self.smooth):
            raise ConfigError("quantization_config: FP8 weights have to be 8 bits, symmetric and in the order of the inputs")
        if self.row_block != 1 and not self.float8:
            raise ConfigError("quantization_config: integers with one scale for several rows are not supported; one an output row is")
        if not self.packed and not self.float8 and (self.bits != 8 or self.group_size is not None or not self.symmetric):
            raise ConfigError("quantization_config: format int-quantized needs symmetric 8-bit weights with one scale an output row")
        if self.bits == 8 and not self.symmetric:
            raise ConfigError("quantization_config: 8-bit weights with zero points are not supported; symmetric ones are")

    def num_groups(self, columns: int) -> int:
        """Return the number of scales per row."""
        return 1 if self.group_size is None else -(-columns // self.group_size)

    @property
    def name(self) -> str:
        """Name in stats: A for activations, W for weights, each with its bits."""
        if self.float8:
            return "a16w8-fp8" + (f"-b{self.row_block}" if self.row_block and self.row_block > 1 else "")
        if self.activation is None:
            words = "rtn-a16w8" if self.bits == 8 and self.group_size is None else f"a16w{self.bits}"
        else:
            words = f"a8w8-{'dynamic' if self.activation == 'token' else 'static'}"
        return words + ("-smooth" if self.smooth else "") + (f"-g{self.group_size}" if self.group_size else "")


def run_as_one(schemes: Sequence[LinearScheme | None]) -> bool:
    """Whether linears with the same input, stored in these schemes, run as one matmul.

    They do not if their schemes differ, or if each scales or quantizes its input with its own stored parameters.
    """
    first = schemes[0]
    own_input = first is not None and (first.smooth or first.act_order or first.activation == "tensor")
    return len(schemes) == 1 or (not own_input and all(other == first for other in schemes))


@dataclass(frozen=True, slots=True)
class LinearGroup:
    """Linears with their own storage scheme."""

    targets: tuple[str, ...]
    """Full names, `re:` and a pattern that matches a prefix of the name, or the class `Linear`."""
    linear: LinearScheme


@dataclass(frozen=True, slots=True)
class Scheme:
    """The quantization of a checkpoint's linears and of its KV cache."""

    linear: LinearScheme | None = None
    """Scheme of every linear that is not in `ignore`; None: all are float."""
    ignore: tuple[str, ...] = ()
    """Linears that stay float: full names, or `re:` and a pattern that matches a prefix of the name."""
    kv_cache: str | None = None
    """None: float; int8 with stored scales "channel" or "tensor", or "token": scales per token, computed at run time."""
    targets: tuple[str, ...] = _ALL_LINEARS
    """Linears that `linear` applies to, as in LinearGroup."""
    others: tuple[LinearGroup, ...] = ()
    """Linears with other schemes than `linear`."""
    _names: frozenset[str] = field(init=False, repr=False, compare=False)
    """The full names in `ignore`: a large model may have a hundred thousand."""
    _patterns: tuple[str, ...] = field(init=False, repr=False, compare=False)
    """The patterns in `ignore`."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "_names", frozenset(entry for entry in self.ignore if not entry.startswith("re:")))
        object.__setattr__(self, "_patterns", tuple(entry[3:] for entry in self.ignore if entry.startswith("re:")))

    @property
    def name(self) -> str:
        """Name in stats: "none", "rtn-a16w8", "a8w8-dynamic", "a16w4-g64-c8", …"""
        words = ["+".join(dict.fromkeys((self.linear.name, *(group.linear.name for group in self.others))))] if self.linear else []
        return "-".join([*words, *(["c8"] if self.kv_cache else [])]) or "none"

    def find_linear(self, name: str) -> LinearScheme | None:
        """Return the scheme of the linear with this full name (without `.weight`); None: float."""
        if self.linear is None or name in self._names or any(re.match(pattern, name) for pattern in self._patterns):
            return None
        if not self.others and self.targets == _ALL_LINEARS:
            return self.linear
        # The order of compressed-tensors: names, then patterns, each alphabetically, then classes; of equal targets the last.
        found = {target: group.linear for group in self.groups for target in group.targets}
        targets = sorted(found, key=lambda target: (target in _ALL_LINEARS, target.startswith("re:"), target))
        return next((found[target] for target in targets if target in _ALL_LINEARS or _names(target, name)), None)

    @property
    def groups(self) -> tuple[LinearGroup, ...]:
        """Return all groups of linears, `linear` first; empty if all are float."""
        return () if self.linear is None else (LinearGroup(self.targets, self.linear), *self.others)

    @property
    def has_integers(self) -> bool:
        """Whether some linears are stored as integers."""
        return any(not group.linear.float8 for group in self.groups)

    def is_quantized(self, name: str) -> bool:
        """Return whether the linear with this full name is quantized."""
        return self.find_linear(name) is not None


def group_linears(linears: Mapping[str, LinearScheme], ignore: tuple[str, ...], kv_cache: str | None = None) -> Scheme:
    """Build the scheme of linears by full name: the most frequent scheme as the default, one group for each of the others."""
    names: dict[LinearScheme, list[str]] = {}
    for name, linear in linears.items():
        names.setdefault(linear, []).append(name)
    if not names:
        return Scheme(kv_cache=kv_cache)
    first, *others = sorted(names, key=lambda linear: -len(names[linear]))
    return Scheme(first, ignore, kv_cache, others=tuple(LinearGroup(tuple(names[linear]), linear) for linear in others))


def read_scheme(raw: Mapping[str, Any]) -> Scheme:
    """Return the scheme declared by the values of a config.json.

    Raises ConfigError for an unsupported scheme, naming the supported ones.
    """
    own_cache = _read_kv_cache(_read_section(raw.get(KV_CACHE_KEY), KV_CACHE_KEY))
    quantization = _read_section(raw.get("quantization_config"), "quantization_config")
    if not quantization:
        return Scheme(kv_cache=own_cache)
    method = quantization.get("quant_method")
    if method != "compressed-tensors":
        raise ConfigError(f"quantization_config: quant_method {quote(method)} is not supported; supported: {SUPPORTED_METHODS}")
    COMPRESSED_KEYS.check(quantization, "quantization_config")
    sparsity = _read_section(quantization.get("sparsity_config"), "sparsity_config")
    if sparsity.get("format") not in (None, "dense"):
        raise ConfigError(f"quantization_config: sparsity_config of format {quote(sparsity['format'])} is not supported; only 'dense' is")
    found = _read_section(quantization.get("config_groups"), "config_groups").values()
    groups = [_read_group(_read_section(group, "the group of config_groups"), quantization.get("format")) for group in found]
    linear = groups[0].linear if groups else None
    kv_cache = own_cache or _read_kv_cache(_read_section(quantization.get("kv_cache_scheme"), "kv_cache_scheme"))
    if linear is None and kv_cache is None:
        raise ConfigError("quantization_config has neither config_groups nor kv_cache_scheme: nothing in it is quantized")
    ignore = _read_names(quantization.get("ignore"), "ignore")
    return Scheme(linear, ignore, kv_cache, groups[0].targets if groups else _ALL_LINEARS, tuple(groups[1:]))


def describe_scheme_keys(raw: Mapping[str, Any]) -> list[str]:
    """Return notes on unused keys of a compressed-tensors `quantization_config`."""
    quantization = raw.get("quantization_config") or {}
    lines = COMPRESSED_KEYS.describe(quantization, "quantization_config")
    for group in (quantization.get("config_groups") or {}).values():
        if (group.get("weights") or {}).get("type") == "float" and group.get("input_activations"):
            lines.append("quantization_config: the inputs of FP8 linears are not quantized: they stay in the compute type")
        lines += GROUP_KEYS.describe(group, "quantization_config: config_groups")
        for key in ("weights", "input_activations"):
            lines += ARGUMENT_KEYS.describe(group.get(key) or {}, f"quantization_config: {key}")
    return list(dict.fromkeys(lines)) + ARGUMENT_KEYS.describe(
        quantization.get("kv_cache_scheme") or {}, "quantization_config: kv_cache_scheme"
    )


def declare_scheme(raw: Mapping[str, Any], scheme: Scheme) -> dict[str, Any]:
    """Return the values of a config.json with `scheme` declared such that other programs can load as much of it as possible.

    Other programs reject caches with a scale per channel or token, although these do not affect the stored weights. They are declared
    under a separate key, so that other programs use a float cache.
    """
    out = {key: value for key, value in raw.items() if key not in ("quantization_config", KV_CACHE_KEY)}
    if scheme.kv_cache in ("channel", "token"):
        out[KV_CACHE_KEY] = write_scheme(scheme)["kv_cache_scheme"]
        scheme = replace(scheme, kv_cache=None)
    if scheme.name != "none":
        out["quantization_config"] = write_scheme(scheme)
    return out


def write_scheme(scheme: Scheme) -> dict[str, Any]:
    """Return the `quantization_config` for config.json in the form that transformers and vLLM read."""
    formats = list(dict.fromkeys(_name_format(group.linear) for group in scheme.groups))
    format = "dense" if not formats else formats[0] if len(formats) == 1 else "mixed-precision"
    out: dict[str, Any] = {
        "quant_method": "compressed-tensors",
        "format": format,
        "quantization_status": "compressed",
        "config_groups": {},
        "ignore": list(scheme.ignore),
        "kv_cache_scheme": None,
    }
    for number, (targets, linear) in enumerate((group.targets, group.linear) for group in scheme.groups):
        weights = _write_weights(linear)
        if linear.act_order:
            weights["actorder"] = "group"
        activations = None
        if linear.activation:
            activations = _write_args(8, linear.activation_symmetric, linear.activation, dynamic=linear.activation == "token")
        out["config_groups"][f"group_{number}"] = {
            "targets": list(targets),
            "format": _name_format(linear),
            "weights": weights,
            "input_activations": activations,
            "output_activations": None,
        }
    if scheme.kv_cache is not None:
        out["kv_cache_scheme"] = _write_args(8, True, scheme.kv_cache, dynamic=scheme.kv_cache == "token")
    return out


def _name_format(linear: LinearScheme) -> str:
    return f"{SMOOTH if linear.smooth else ''}{'float' if linear.float8 else 'pack' if linear.packed else 'int'}-quantized"


def _names(entry: str, name: str) -> bool:
    return re.match(entry[3:], name) is not None if entry.startswith("re:") else entry == name


def _read_section(value: Any, name: str) -> Mapping[str, Any]:
    """Return a section of config.json; empty if it is missing."""
    if value is not None and not isinstance(value, Mapping):
        place = name if name in ("quantization_config", KV_CACHE_KEY) else f"quantization_config: {name}"
        raise ConfigError(f"{place} is {quote(value)}, but an object is needed")
    return value or {}


def read_flag(section: Mapping[str, Any], key: str, default: bool) -> bool:
    """Return a flag of `quantization_config`. Raises ConfigError unless it is true or false."""
    value = section.get(key)
    if value is not None and not isinstance(value, bool):
        raise ConfigError(f"quantization_config: {key} is {quote(value)}, but true or false is needed")
    return default if value is None else value


def _read_group(group: Mapping[str, Any], default_format: Any) -> LinearGroup:
    targets = _read_names(group.get("targets"), "targets")
    if not targets or any("." not in target and target not in _ALL_LINEARS for target in targets):
        raise ConfigError(
            f"quantization_config: targets {quote(group.get('targets'))} are not supported; 'Linear', full names and 're:' patterns are"
        )
    return LinearGroup(targets, _read_linear(group, default_format))


def _read_names(value: Any, key: str) -> tuple[str, ...]:
    entries = [] if value is None else value
    if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
        raise ConfigError(f"quantization_config: {key} is {quote(value)}, but a list of names is needed")
    for entry in entries:
        if entry.startswith("re:"):
            check_pattern(entry, key)
    return tuple(entries)


def check_pattern(entry: str, key: str) -> None:
    """Raise ConfigError for an invalid regular expression (after a three-character prefix), or one that could run for hours."""
    plain = re.sub(r"\\.", "", entry[3:])
    repeats = sum(plain.count(sign) for sign in "*+{")
    if len(entry) > _MAX_PATTERN or repeats > _MAX_REPEATS or re.search(r"\)[*+{]", plain):
        raise ConfigError(
            f"quantization_config: the pattern {quote(entry)} in {key} is not supported; up to {_MAX_PATTERN} characters and "
            f"{_MAX_REPEATS} of * and +, none behind a group, are"
        )
    try:
        re.compile(entry[3:])
    except (re.error, OverflowError, RecursionError) as error:
        raise ConfigError(f"quantization_config: {quote(entry)} in {key} is no pattern: {error}") from None


def _read_linear(group: Mapping[str, Any], default_format: Any) -> LinearScheme:
    format = group.get("format") or default_format or ""
    if not isinstance(format, str) or format.removeprefix(SMOOTH) not in _FORMATS:
        raise ConfigError(f"quantization_config: format {quote(format)} is not supported; there are {', '.join(_FORMATS)}")
    GROUP_KEYS.check(group, "quantization_config: a group of config_groups")
    weights = _read_section(group.get("weights"), "weights")
    activations = _read_section(group.get("input_activations"), "input_activations")
    if format == "float-quantized" or (format == "naive-quantized" and weights.get("type") == "float"):
        return _read_float8(weights, activations)
    _check_int(weights, "weights", ("channel", "group"), dynamic=(False,))
    if activations:
        _check_int(activations, "input_activations", ("token", "tensor"), dynamic=(True, False))
        if activations.get("num_bits") != 8 or bool(activations.get("dynamic")) != (activations["strategy"] == "token"):
            raise ConfigError("quantization_config: input_activations have to be 8 bits, dynamic for each token or static for the tensor")
    is_grouped, order = weights["strategy"] == "group", weights.get("actorder")
    if is_grouped and weights.get("group_size") is None:
        raise ConfigError("quantization_config: weights lack group_size, which strategy 'group' needs")
    if order not in (None, False) and not (isinstance(order, str) and order in _ACT_ORDER):
        raise ConfigError(f"quantization_config: actorder {quote(order)} is not supported; there are {', '.join(_ACT_ORDER)}")
    return LinearScheme(
        bits=weights.get("num_bits"),  # type: ignore[arg-type]  # LinearScheme rejects non-numbers
        group_size=weights["group_size"] if is_grouped else None,
        symmetric=read_flag(weights, "symmetric", True),
        packed=_FORMATS[format.removeprefix(SMOOTH)],
        act_order=isinstance(order, str) and _ACT_ORDER[order],
        activation=activations["strategy"] if activations else None,
        activation_symmetric=read_flag(activations, "symmetric", True),
        smooth=format.startswith(SMOOTH),
    )


def _read_float8(weights: Mapping[str, Any], activations: Mapping[str, Any]) -> LinearScheme:
    """Read FP8 weights. Their activations stay in the compute dtype, of which `describe_scheme_keys` tells."""
    _check_args(weights, "weights", {"type": ("float",), "num_bits": (8,), "strategy": ("tensor", "channel", "group", "block")}, (False,))
    if activations:
        allowed = {"type": ("float",), "num_bits": (8,), "strategy": ("tensor", "token", "group", "channel")}
        _check_args(activations, "input_activations", allowed, (True, False))
    strategy, rows, columns = weights["strategy"], 1, None
    if strategy == "block":
        rows, columns = read_block(weights.get("block_structure"), "block_structure")
    elif strategy == "group":
        columns = weights.get("group_size")
        if columns is None:
            raise ConfigError("quantization_config: weights lack group_size, which strategy 'group' needs")
    return LinearScheme(
        packed=False,
        float8=True,
        symmetric=read_flag(weights, "symmetric", True),
        act_order=weights.get("actorder") not in (None, False),
        group_size=columns,
        row_block=None if strategy == "tensor" else rows,
    )


def read_block(value: Any, key: str) -> tuple[int, int]:
    """Return the rows and columns of an FP8 block. Raises ConfigError unless it is a list of two whole numbers."""
    sizes = value if isinstance(value, list) else []
    if len(sizes) != 2 or any(type(size) is not int or not 1 < size <= _MAX_GROUP for size in sizes):
        raise ConfigError(f"quantization_config: {key} is {quote(value)}, but two whole numbers from 2 are needed, such as [128, 128]")
    return sizes[0], sizes[1]


def _read_kv_cache(raw: Mapping[str, Any]) -> str | None:
    if not raw:
        return None
    _check_int(raw, "kv_cache_scheme", ("tensor", "channel", "token"), dynamic=(True, False))
    if raw.get("num_bits") != 8 or not read_flag(raw, "symmetric", True) or bool(raw.get("dynamic")) != (raw["strategy"] == "token"):
        raise ConfigError("quantization_config: kv_cache_scheme has to be symmetric int8, static (tensor, channel) or dynamic (token)")
    return str(raw["strategy"])


def _check_int(raw: Mapping[str, Any], section: str, strategies: tuple[str, ...], dynamic: tuple[bool, ...]) -> None:
    _check_args(raw, section, {"type": ("int",), "strategy": strategies}, dynamic)
    if raw.get("block_structure") is not None:
        raise ConfigError(f"quantization_config: block_structure of {section} is {quote(raw['block_structure'])}, but only FP8 has blocks")


def _check_args(raw: Mapping[str, Any], section: str, allowed: Mapping[str, tuple[Any, ...]], dynamic: tuple[bool, ...]) -> None:
    ARGUMENT_KEYS.check(raw, f"quantization_config: {section}")
    for key, values in {**allowed, "dynamic": dynamic}.items():
        found = raw.get(key) or False if key == "dynamic" else raw.get(key)
        if type(found) not in (str, bool, int) or not any(found == value and type(found) is type(value) for value in values):
            known = " or ".join(map(repr, values))
            raise ConfigError(f"quantization_config: {key} of {section} is {quote(found)}, but only {known} is supported")


def _write_weights(linear: LinearScheme) -> dict[str, Any]:
    strategy = "tensor" if linear.row_block is None else "channel" if linear.group_size is None else "group"
    out = _write_args(linear.bits, linear.symmetric, strategy, dynamic=False)
    out.update(group_size=linear.group_size, observer="minmax")
    if linear.float8:
        out["type"] = "float"
        if linear.row_block and linear.row_block > 1:
            out.update(strategy="block", block_structure=[linear.row_block, linear.group_size], group_size=None)
    return out


def _write_args(bits: int, symmetric: bool, strategy: str, *, dynamic: bool) -> dict[str, Any]:
    return {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": strategy, "dynamic": dynamic}
