"""The table of a decoder's tensors (Hugging Face names, shapes, splits), used for loading, resharding and planning."""

import functools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from model.spec.config import DTYPES, LlamaConfig
from model.spec.families import list_architectures
from model.spec.linear_scheme import LinearScheme
from model.spec.quoting import quote_name
from model.spec.scheme import Scheme
from parallel.layout import Layout, Split

if TYPE_CHECKING:
    from model.spec.tensor_info import TensorInfo

FLOAT_DTYPES = tuple(DTYPES)
"""Dtypes in which a checkpoint may store unquantized weights."""

FLOAT8_DTYPES = ("float8_e4m3fn",)
"""Of FP8 weights."""

_ATTENTION: Mapping[str, tuple[str, str, str]] = {
    # name in the layer: (rows, columns, split), all keys of `_sizes` and fields of Layout
    "self_attn.q_proj": ("query", "hidden", "query"),
    "self_attn.k_proj": ("key_value", "hidden", "key_value"),
    "self_attn.v_proj": ("key_value", "hidden", "key_value"),
    "self_attn.o_proj": ("hidden", "query", "hidden"),
}
_FEED_FORWARD: Mapping[str, tuple[str, str, str]] = {
    "mlp.gate_proj": ("intermediate", "hidden", "intermediate"),
    "mlp.up_proj": ("intermediate", "hidden", "intermediate"),
    "mlp.down_proj": ("hidden", "intermediate", "hidden"),
}
_FUSED_ATTENTION: Mapping[str, tuple[str, ...]] = {
    "qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o_proj": ("self_attn.o_proj",),
}
_FUSED_FEED_FORWARD: Mapping[str, tuple[str, ...]] = {
    "gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
    "down_proj": ("mlp.down_proj",),
}
MINDFORMERS_NAMES: Mapping[str, str] = {
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
}
"""MindFormers' names of the linears in a layer."""
_MINDFORMERS_FUSED: Mapping[str, str] = {
    **dict.fromkeys(_FUSED_ATTENTION["qkv_proj"], "attention.w_qkv"),
    **dict.fromkeys(_FUSED_FEED_FORWARD["gate_up_proj"], "feed_forward.w_gate_hidden"),
}
"""Those that it fuses with qkv_concat True."""
_IGNORED_SUFFIXES = ("rotary_emb.inv_freq", "weight_zero_point", "input_zero_point", "k_zero_point", "v_zero_point")
"""Old exports include rotary frequencies, and zeros for the zero points of symmetric schemes."""


_UNEXPECTED_PARTS = {
    ".bias": "biases are supported only where attention_bias or mlp_bias is true",
    ".experts.": "its model_type has no such experts",
    "score.": "a classification head is not supported",
    ".q_norm.": "its model_type has no norms of queries and keys",
    "vision": "vision models are not supported",
    "weight_scale_inv": "FP8 weights need a quantization_config of quant_method fp8",
    ".SCB": "bitsandbytes weights are not supported",
    ".quant_state.": "bitsandbytes weights are not supported",
    ".biases": "MLX quantized weights are not supported",
}
"""Explanations of unexpected tensors, by a part of the name."""
_LAYER = re.compile(r"model\.layers\.(\d{1,5})\.")


@dataclass(frozen=True, slots=True)
class WeightSpec:
    """Requirements for the tensor with one name."""

    shape: tuple[int, ...]
    """Full shape."""
    dtypes: tuple[str, ...]
    """Supported dtypes, by their PyTorch names."""
    split: Split
    """How its rows are split."""
    full_rows: int | None = None
    """Number of rows that `split` applies to, if `shape` has one for several of them."""
    rows_a_word: int = 1
    """Rows per row of `shape`, as of packed words and of the scales of blocks."""

    def rows(self, rank: int, world_size: int) -> tuple[int, int]:
        """Return rows [start, stop) of `rank`; rows of `shape` that several ranks need are read by each of them."""
        start, stop = self.split.interval(self.full_rows or self.shape[0], rank, world_size)
        return start // self.rows_a_word, -(-stop // self.rows_a_word)


@dataclass(slots=True)
class TensorReport:
    """Differences between the tensors of a checkpoint and those that a model needs."""

    missing: list[str] = field(default_factory=list)
    """Required but absent."""
    unexpected: list[str] = field(default_factory=list)
    """Present but unknown."""
    mismatched: list[str] = field(default_factory=list)
    """Present with another shape or dtype, described."""

    def describe(self, config: LlamaConfig | None = None) -> str:
        """Describe each kind of difference in one line with up to ten names, after a common explanation; empty if there are none."""
        parts = self._explain(config) if config else []
        for kind in ("missing", "unexpected", "mismatched"):
            names = getattr(self, kind)
            if names:
                more = f", and {len(names) - 10} more" if len(names) > 10 else ""
                shown = names[:10] if kind == "mismatched" else [quote_name(name) for name in names[:10]]
                parts.append(f"{len(names)} {kind}: {', '.join(shown)}{more}")
        return "; ".join(parts)

    def _explain(self, config: LlamaConfig) -> list[str]:
        """Explain the usual cause of unexpected and missing names."""
        parts = [words for part, words in _UNEXPECTED_PARTS.items() if any(part in name for name in self.unexpected)]
        layers = {int(match[1]) for name in self.unexpected if (match := _LAYER.match(name))}
        if layers and max(layers) >= config.num_hidden_layers:
            parts.append(f"num_hidden_layers is {config.num_hidden_layers}, but there are tensors of layer {max(layers)}")
        if self.missing == ["lm_head.weight"] and not config.tie_word_embeddings:
            parts.append("there is no output head, and tie_word_embeddings is not true")
        return parts


def list_fused(config: LlamaConfig, layer: int) -> Mapping[str, tuple[str, ...]]:
    """Return the linears in each fused matmul of a decoder layer, by the path of its module: names in the layer, in loading order."""
    return _list_fused(config.model_type, _count_experts(config, layer))


def list_norms(config: LlamaConfig) -> Mapping[str, str]:
    """Return the norms of a decoder layer, by the attribute of its module: names in the layer."""
    heads = {"q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"} if config.qk_norm else {}
    if config.sandwich_norms:
        before = {"post_attention_layernorm": "pre_feedforward_layernorm", "attention_norm": "post_attention_layernorm"}
        return {"input_layernorm": "input_layernorm", **before, "feed_forward_norm": "post_feedforward_layernorm", **heads}
    return {"input_layernorm": "input_layernorm", "post_attention_layernorm": "post_attention_layernorm", **heads}


def norm_size(config: LlamaConfig, attribute: str) -> int:
    """Return the number of elements of a layer's norm, by the attribute of its module."""
    return config.head_dim if attribute in ("q_norm", "k_norm") else config.hidden_size


def linear_shape(config: LlamaConfig, name: str) -> tuple[int, int]:
    """Return the full [rows, columns] of a decoder layer's linear, by its name in the layer."""
    rows, columns, _ = _find_linear(config, name)
    sizes = _sizes(config)
    return sizes[rows], sizes[columns]


def has_bias(config: LlamaConfig, name: str) -> bool:
    """Return whether a decoder layer's linear, by its name in the layer or its full name, has a bias."""
    if "self_attn." in name:
        return config.output_bias if name.endswith("o_proj") else config.attention_bias
    return config.mlp_bias and ".experts." not in name and "mlp." in name


def linear_names(config: LlamaConfig) -> Iterator[str]:
    """Return the full names, without `.weight`, of all linears of the decoder layers."""
    for layer in range(config.num_hidden_layers):
        for names in list_fused(config, layer).values():
            for name in names:
                yield f"model.layers.{layer}.{name}"


def stored_linear_names(config: LlamaConfig) -> Iterator[str]:
    """Do the same with the names of a checkpoint of this family, which may store several linears as one."""
    stored = {linear: fused for fused, linears in config.architecture.fused.items() for linear in linears}
    seen = set()
    for name in linear_names(config):
        prefix, short = name.rsplit(".", 2)[0], ".".join(name.split(".")[-2:])
        name = f"{prefix}.{stored[short]}" if short in stored else name
        if name not in seen:
            seen.add(name)
            yield name


@functools.cache
def _list_linears(model_type: str, num_experts: int) -> Mapping[str, Mapping[str, tuple[str, str, str]]]:
    """Return the linears of a layer by the path of their fused module; `num_experts` is 0 for one feed-forward."""
    linears = {fused: {name: _ATTENTION[name] for name in names} for fused, names in _FUSED_ATTENTION.items()}
    if not num_experts:
        return linears | {fused: {name: _FEED_FORWARD[name] for name in names} for fused, names in _FUSED_FEED_FORWARD.items()}
    stored = list_architectures()[model_type].experts
    for expert in range(num_experts):
        gate, up, down = (name.format(expert) for name in (stored.gate, stored.up, stored.down))
        linears[f"experts.{expert}.gate_up_proj"] = dict.fromkeys((gate, up), ("experts", "hidden", "experts"))
        linears[f"experts.{expert}.down_proj"] = {down: ("hidden", "experts", "hidden")}
    return linears


@functools.cache
def _list_fused(model_type: str, num_experts: int) -> Mapping[str, tuple[str, ...]]:
    return {fused: tuple(linears) for fused, linears in _list_linears(model_type, num_experts).items()}


@functools.cache
def _index_linears(model_type: str, num_experts: int) -> Mapping[str, tuple[str, str, str]]:
    return {name: found for linears in _list_linears(model_type, num_experts).values() for name, found in linears.items()}


def _count_experts(config: LlamaConfig, layer: int) -> int:
    return config.experts.count if config.experts is not None and config.has_experts(layer) else 0


def _find_linear(config: LlamaConfig, name: str) -> tuple[str, str, str]:
    dense = _index_linears(config.model_type, 0)
    return dense[name] if name in dense else _index_linears(config.model_type, config.experts.count if config.experts else 0)[name]


def find_not_converted(config: LlamaConfig, words: Sequence[str]) -> tuple[str, ...]:
    """Return the full names of the linears, including the head, whose Hugging Face or MindFormers name contains one of `words`.

    Always includes a tied head, since it is the embedding.
    """
    found = []
    for name in (*linear_names(config), "lm_head"):
        layer, short = name.rsplit(".", 2)[0], ".".join(name.split(".")[-2:])
        names = (name, *(f"{layer}.{theirs}" for theirs in (MINDFORMERS_NAMES.get(short), _MINDFORMERS_FUSED.get(short)) if theirs))
        if any(word in one for word in words for one in names) or (name == "lm_head" and config.tie_word_embeddings):
            found.append(name)
    return tuple(found)


def plan_weights(config: LlamaConfig, scheme: Scheme, layers: Iterable[int] | None = None) -> dict[str, WeightSpec]:
    """Return the required tensors of a checkpoint of this model with this scheme; only of some `layers`, if given."""
    layout = config.layout()
    embedding = WeightSpec((config.vocab_size, config.hidden_size), FLOAT_DTYPES, layout.vocab)
    norm = WeightSpec((config.hidden_size,), FLOAT_DTYPES, layout.whole)
    specs = {"model.embed_tokens.weight": embedding}
    for layer in range(config.num_hidden_layers) if layers is None else layers:
        prefix = f"model.layers.{layer}"
        for attribute, name in list_norms(config).items():
            specs[f"{prefix}.{name}.weight"] = WeightSpec((norm_size(config, attribute),), FLOAT_DTYPES, layout.whole)
        if config.experts is not None and config.has_experts(layer):
            shape = (config.experts.count, config.hidden_size)
            specs[f"{prefix}.{config.architecture.experts.router}.weight"] = WeightSpec(shape, FLOAT_DTYPES, layout.whole)
        for name in (name for names in list_fused(config, layer).values() for name in names):
            split = _find_linear(config, name)[2]
            specs.update(_linear_specs(f"{prefix}.{name}", linear_shape(config, name), getattr(layout, split), layout, scheme))
            if has_bias(config, name):
                specs[f"{prefix}.{name}.bias"] = WeightSpec(linear_shape(config, name)[:1], FLOAT_DTYPES, getattr(layout, split))
        if scheme.kv_cache in ("channel", "tensor"):
            size, kind = (_sizes(config)["key_value"], "key_value") if scheme.kv_cache == "channel" else (1, "whole")
            cache = WeightSpec((size,), FLOAT_DTYPES, getattr(layout, kind))
            specs.update({f"{prefix}.self_attn.{name}": cache for name in ("k_scale", "v_scale")})
    specs["model.norm.weight"] = norm
    if not config.tie_word_embeddings:
        stored = replace(scheme, head=None)
        specs.update(_linear_specs("lm_head", embedding.shape, layout.vocab, layout, stored))
    return specs


def compare_tensors(specs: Mapping[str, WeightSpec], tensors: "Mapping[str, TensorInfo]", *, tied: bool) -> TensorReport:
    """Compare `tensors` with the required ones."""
    report = TensorReport(missing=[name for name in specs if name not in tensors])
    for name, info in tensors.items():
        spec = specs.get(name)
        if spec is None:
            # A tied model may store a copy of its head.
            if not name.endswith(_IGNORED_SUFFIXES) and not (tied and name == "lm_head.weight") and not _scales_float8_input(name, specs):
                report.unexpected.append(name)
        elif info.shape != spec.shape:
            report.mismatched.append(f"{name} has shape {list(info.shape)}, the config needs {list(spec.shape)}")
        elif info.dtype_name not in spec.dtypes:
            report.mismatched.append(f"{name} is {info.dtype_name}, but {' or '.join(spec.dtypes)} is needed")
    return report


def _scales_float8_input(name: str, specs: Mapping[str, WeightSpec]) -> bool:
    owner, _, part = name.rpartition(".")
    weight = specs.get(f"{owner}.weight")
    return part == "input_scale" and weight is not None and weight.dtypes == FLOAT8_DTYPES


def _sizes(config: LlamaConfig) -> dict[str, int]:
    return {
        "hidden": config.hidden_size,
        "intermediate": config.intermediate_size,
        "experts": 0 if config.experts is None else config.experts.intermediate_size,
        "query": config.num_attention_heads * config.head_dim,
        "key_value": config.num_key_value_heads * config.head_dim,
    }


def _float8_specs(name: str, shape: tuple[int, ...], split: Split, layout: Layout, linear: LinearScheme) -> dict[str, WeightSpec]:
    rows, block, groups = shape[0], linear.row_block, linear.num_groups(shape[1])
    scale = WeightSpec((1,), FLOAT_DTYPES, layout.whole)
    if block is not None:
        scale = WeightSpec((-(-rows // block), groups), FLOAT_DTYPES, split, rows, block)
    return {f"{name}.weight_scale": scale, f"{name}.weight": WeightSpec(shape, FLOAT8_DTYPES, split)}


def _linear_specs(name: str, shape: tuple[int, ...], split: Split, layout: Layout, scheme: Scheme) -> dict[str, WeightSpec]:
    linear = scheme.find_linear(name)
    if linear is None:
        return {f"{name}.weight": WeightSpec(shape, FLOAT_DTYPES, split)}
    rows, columns = shape
    if linear.float8:
        return _float8_specs(name, shape, split, layout, linear)
    per_word, groups, whole = 32 // linear.bits, linear.num_groups(columns), layout.whole
    specs = {f"{name}.weight_scale": WeightSpec((rows, groups), FLOAT_DTYPES, split)}
    if linear.packed:
        specs[f"{name}.weight_packed"] = WeightSpec((rows, -(-columns // per_word)), ("int32",), split)
        specs[f"{name}.weight_shape"] = WeightSpec((2,), ("int64",), whole)
    else:
        specs[f"{name}.weight"] = WeightSpec(shape, ("int8",), split)
    if not linear.symmetric:
        specs[f"{name}.weight_zero_point"] = WeightSpec((-(-rows // per_word), groups), ("int32",), split, rows, per_word)
    if linear.act_order:
        specs[f"{name}.weight_g_idx"] = WeightSpec((columns,), ("int32",), whole)
    if linear.activation == "tensor":
        specs[f"{name}.input_scale"] = WeightSpec((1,), FLOAT_DTYPES, whole)
        if not linear.activation_symmetric:
            specs[f"{name}.input_zero_point"] = WeightSpec((1,), ("int8",), whole)
    if linear.smooth:
        specs[f"{name}.smooth_scale"] = WeightSpec((columns,), FLOAT_DTYPES, whole)
    return specs
