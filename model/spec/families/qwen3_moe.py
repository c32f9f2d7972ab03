"""Qwen 3 with experts: 30B-A3B, 235B-A22B."""

from collections.abc import Mapping
from typing import Any

from model.spec.architecture import Architecture, Experts, GgufNames
from model.spec.config_keys import CONFIG_KEYS
from model.spec.quoting import quote
from model.spec.windows import read_uniform_window
from parallel.errors import ConfigError

_READ = (
    "decoder_sparse_step",
    "layer_types",
    "mlp_only_layers",
    "moe_intermediate_size",
    "norm_topk_prob",
    "num_experts",
    "num_experts_per_tok",
    "num_local_experts",
    "use_sliding_window",
)


def _read(raw: Mapping[str, Any]) -> dict[str, Any]:
    biased, names = raw.get("attention_bias") or False, ("num_experts", "num_local_experts")
    counts = [raw[name] for name in names if raw.get(name) is not None]
    if len({str(count) for count in counts}) > 1:
        raise ConfigError(f"num_experts is {quote(counts[0])}, but num_local_experts is {quote(counts[1])}: remove the wrong one")
    window = raw.get("sliding_window") if raw.get("use_sliding_window") else None
    experts = Experts(
        count=counts[0] if counts else 128,
        per_token=raw["num_experts_per_tok"],
        intermediate_size=raw["moe_intermediate_size"],
        normalized=raw["norm_topk_prob"],
        dense_layers=_list_dense(raw),
    )
    return {"attention_bias": biased, "output_bias": biased, "experts": experts, **read_uniform_window(raw, window)}


def _list_dense(raw: Mapping[str, Any]) -> tuple[int, ...]:
    dense, step, count = raw["mlp_only_layers"], raw["decoder_sparse_step"], raw["num_hidden_layers"]
    if type(step) is not int or step < 1 or not isinstance(dense, list) or not all(type(layer) is int for layer in dense):
        raise ConfigError(f"decoder_sparse_step is {quote(step)} and mlp_only_layers {quote(dense)}: a number and a list are needed")
    layers = range(min(count, 100_000) if type(count) is int else 0)
    return tuple(layer for layer in layers if layer in set(dense) or (layer + 1) % step)


ARCHITECTURE = Architecture(
    model_type="qwen3_moe",
    class_names=("Qwen3MoeForCausalLM", "Qwen3MoeModel"),
    keys=CONFIG_KEYS.adapt("config.json of qwen3_moe", read=_READ, ignored={"mlp_bias": (False,), "attention_chunk_size": ()}),
    defaults={
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "norm_topk_prob": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "bos_token_id": None,
        "eos_token_id": None,
    },
    features={"qk_norm": True},
    read=_read,
    gguf=GgufNames(
        architecture="qwen3moe",
        layer={f"attn_{short}_norm.weight": f"self_attn.{short}_norm.weight" for short in ("q", "k")},
        sizes={
            "expert_count": "num_experts",
            "expert_used_count": "num_experts_per_tok",
            "expert_feed_forward_length": "moe_intermediate_size",
        },
        values={"norm_topk_prob": True},  # as llama.cpp computes it
    ),
    mindformers=("Qwen3MoeConfig", "Qwen3MoeForCausalLM"),
)
