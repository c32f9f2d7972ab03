"""The table of a Llama model's tensors: Hugging Face names, shapes, splits. Loading, resharding and plans read it.

Knows names and sizes; reads nothing.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from model.checkpoint.source import TensorInfo, TensorReport
from model.config import LlamaConfig
from model.scheme import Scheme
from parallel.layout import Layout, Split

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Types in which a checkpoint may store weights that are not quantized."""

_LINEARS: Mapping[str, tuple[str, str, str]] = {
    # name in the layer: (rows, columns, split), all keys of `_sizes` and fields of Layout
    "self_attn.q_proj": ("query", "hidden", "query"),
    "self_attn.k_proj": ("key_value", "hidden", "key_value"),
    "self_attn.v_proj": ("key_value", "hidden", "key_value"),
    "self_attn.o_proj": ("hidden", "query", "hidden"),
    "mlp.gate_proj": ("intermediate", "hidden", "intermediate"),
    "mlp.up_proj": ("intermediate", "hidden", "intermediate"),
    "mlp.down_proj": ("hidden", "intermediate", "hidden"),
}
_NORMS = ("input_layernorm", "post_attention_layernorm")
_IGNORED_SUFFIXES = ("rotary_emb.inv_freq",)


@dataclass(frozen=True, slots=True)
class WeightSpec:
    """What a checkpoint has to hold under one name."""

    shape: tuple[int, ...]
    """Full shape."""
    dtypes: tuple[torch.dtype, ...]
    """Types that can be read."""
    split: Split
    """How its rows are dealt out."""

    def rows(self, rank: int, world_size: int) -> tuple[int, int]:
        """Rows [start, stop) of `rank`."""
        return self.split.interval(self.shape[0], rank, world_size)


def linear_shape(config: LlamaConfig, name: str) -> tuple[int, int]:
    """Full [rows, columns] of a linear of a decoder layer, by its name in the layer."""
    rows, columns, _ = _LINEARS[name]
    sizes = _sizes(config)
    return sizes[rows], sizes[columns]


def linear_names(config: LlamaConfig) -> Iterator[str]:
    """Full names, without `.weight`, of all linears of the decoder layers."""
    for layer in range(config.num_hidden_layers):
        for name in _LINEARS:
            yield f"model.layers.{layer}.{name}"


def plan_weights(config: LlamaConfig, scheme: Scheme) -> dict[str, WeightSpec]:
    """Every tensor that a checkpoint of this model, stored in this scheme, has to hold."""
    layout = config.layout()
    embedding = WeightSpec((config.vocab_size, config.hidden_size), FLOAT_DTYPES, layout.vocab)
    norm = WeightSpec((config.hidden_size,), FLOAT_DTYPES, layout.whole)
    specs = {"model.embed_tokens.weight": embedding}
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        specs.update({f"{prefix}.{name}.weight": norm for name in _NORMS})
        for name, (_, _, split) in _LINEARS.items():
            specs.update(_linear_specs(f"{prefix}.{name}", linear_shape(config, name), getattr(layout, split), layout, scheme))
    specs["model.norm.weight"] = norm
    if not config.tie_word_embeddings:
        specs.update(_linear_specs("lm_head", embedding.shape, layout.vocab, layout, scheme))
    return specs


def compare_tensors(specs: Mapping[str, WeightSpec], tensors: Mapping[str, TensorInfo], *, tied: bool) -> TensorReport:
    """What is missing, unexpected or different in `tensors`."""
    report = TensorReport(missing=[name for name in specs if name not in tensors])
    for name, info in tensors.items():
        spec = specs.get(name)
        if spec is None:
            # A tied model may carry its head a second time, and old exports carry the rotary frequencies.
            if not name.endswith(_IGNORED_SUFFIXES) and not (tied and name == "lm_head.weight"):
                report.unexpected.append(name)
        elif info.shape != spec.shape:
            report.mismatched.append(f"{name} has shape {list(info.shape)}, config.json needs {list(spec.shape)}")
        elif info.dtype not in spec.dtypes:
            allowed = " or ".join(_word(dtype) for dtype in spec.dtypes)
            report.mismatched.append(f"{name} is {_word(info.dtype)}, but {allowed} is needed")
    return report


def _sizes(config: LlamaConfig) -> dict[str, int]:
    return {
        "hidden": config.hidden_size,
        "intermediate": config.intermediate_size,
        "query": config.num_attention_heads * config.head_dim,
        "key_value": config.num_key_value_heads * config.head_dim,
    }


def _linear_specs(name: str, shape: tuple[int, ...], split: Split, layout: Layout, scheme: Scheme) -> dict[str, WeightSpec]:
    if not scheme.is_quantized(name):
        return {f"{name}.weight": WeightSpec(shape, FLOAT_DTYPES, split)}
    rows, columns = shape
    return {
        f"{name}.weight_packed": WeightSpec((rows, -(-columns // 4)), (torch.int32,), split),
        f"{name}.weight_scale": WeightSpec((rows, 1), FLOAT_DTYPES, split),
        f"{name}.weight_shape": WeightSpec((2,), (torch.int64,), layout.whole),
    }


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
