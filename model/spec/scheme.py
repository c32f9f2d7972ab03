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
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from model.spec.linear_scheme import LinearGroup, LinearScheme
from model.spec.quantization_keys import ARGUMENT_KEYS, COMPRESSED_KEYS, GROUP_KEYS, SUPPORTED_METHODS, TOLD_BY_TENSORS
from model.spec.quantization_sections import ALL_LINEARS, KV_CACHE_KEY, SMOOTH, read_group, read_kv_cache, read_names, read_section
from model.spec.quoting import quote
from parallel.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Scheme:
    """The quantization of a checkpoint's linears and of its KV cache."""

    linear: LinearScheme | None = None
    """Scheme of every linear that is not in `ignore`; None: all are float."""
    ignore: tuple[str, ...] = ()
    """Linears that stay float: full names, or `re:` and a pattern that matches a prefix of the name."""
    kv_cache: str | None = None
    """None: float; int8 with stored scales "channel" or "tensor", or "token": scales per token, computed at run time."""
    targets: tuple[str, ...] = ALL_LINEARS
    """Linears that `linear` applies to, as in LinearGroup."""
    others: tuple[LinearGroup, ...] = ()
    """Linears with other schemes than `linear`."""
    head: LinearScheme | None = None
    """Scheme of an output head that is stored as floats and quantized while it is loaded; never declared in a config.json."""
    _names: frozenset[str] = field(init=False, repr=False, compare=False)
    """The full names in `ignore`: a large model may have a hundred thousand."""
    _patterns: tuple[str, ...] = field(init=False, repr=False, compare=False)
    """The patterns in `ignore`."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "_names", frozenset(entry for entry in self.ignore if not entry.startswith("re:")))
        object.__setattr__(self, "_patterns", tuple(entry[3:] for entry in self.ignore if entry.startswith("re:")))

    @property
    def name(self) -> str:
        """Name in stats: "none", "rtn-a16w8", "a8w8-dynamic", "a16w4-g64-h8-c8", …"""
        words = ["+".join(dict.fromkeys((self.linear.name, *(group.linear.name for group in self.others))))] if self.linear else []
        return "-".join([*words, *(["h8"] if self.head else []), *(["c8"] if self.kv_cache else [])]) or "none"

    def find_linear(self, name: str) -> LinearScheme | None:
        """Return the scheme of the linear with this full name (without `.weight`); None: float."""
        if name == "lm_head" and self.head is not None:
            return self.head
        if self.linear is None or name in self._names or any(re.match(pattern, name) for pattern in self._patterns):
            return None
        if not self.others and self.targets == ALL_LINEARS:
            return self.linear
        # The order of compressed-tensors: names, then patterns, each alphabetically, then classes; of equal targets the last.
        found = {target: group.linear for group in self.groups for target in group.targets}
        targets = sorted(found, key=lambda target: (target in ALL_LINEARS, target.startswith("re:"), target))
        return next((found[target] for target in targets if target in ALL_LINEARS or _names(target, name)), None)

    @property
    def groups(self) -> tuple[LinearGroup, ...]:
        """Return all groups of linears, `linear` first; empty if all are float."""
        return () if self.linear is None else (LinearGroup(self.targets, self.linear), *self.others)

    @property
    def has_integers(self) -> bool:
        """Whether some linears are integers in memory."""
        return self.head is not None or any(not group.linear.float8 for group in self.groups)

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
    own_cache = read_kv_cache(read_section(raw.get(KV_CACHE_KEY), KV_CACHE_KEY))
    quantization = read_section(raw.get("quantization_config"), "quantization_config")
    if not quantization:
        return Scheme(kv_cache=own_cache)
    method = quantization.get("quant_method")
    if isinstance(method, str) and method.lower() in TOLD_BY_TENSORS:
        raise ConfigError(
            f"quantization_config: only the tensors tell what quant_method {quote(method)} quantizes: give the checkpoint, not its "
            "config.json"
        )
    if method != "compressed-tensors":
        raise ConfigError(f"quantization_config: quant_method {quote(method)} is not supported; supported: {SUPPORTED_METHODS}")
    COMPRESSED_KEYS.check(quantization, "quantization_config")
    sparsity = read_section(quantization.get("sparsity_config"), "sparsity_config")
    if sparsity.get("format") not in (None, "dense"):
        raise ConfigError(f"quantization_config: sparsity_config of format {quote(sparsity['format'])} is not supported; only 'dense' is")
    found = read_section(quantization.get("config_groups"), "config_groups").values()
    groups = [read_group(read_section(group, "the group of config_groups"), quantization.get("format")) for group in found]
    linear = groups[0].linear if groups else None
    kv_cache = own_cache or read_kv_cache(read_section(quantization.get("kv_cache_scheme"), "kv_cache_scheme"))
    if linear is None and kv_cache is None:
        raise ConfigError("quantization_config has neither config_groups nor kv_cache_scheme: nothing in it is quantized")
    ignore = read_names(quantization.get("ignore"), "ignore")
    return Scheme(linear, ignore, kv_cache, groups[0].targets if groups else ALL_LINEARS, tuple(groups[1:]))


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
