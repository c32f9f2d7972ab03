"""Mixtral 8x7B and 8x22B: Mistral with experts."""

from collections.abc import Mapping
from typing import Any

from model.spec.architecture import Architecture, ExpertNames, Experts, GgufNames
from model.spec.config_keys import CONFIG_KEYS
from model.spec.windows import read_uniform_window

KEYS = CONFIG_KEYS.adapt(
    "config.json of mixtral",
    read=("layer_types", "num_local_experts", "num_experts_per_tok"),
    ignored={"attention_bias": (False,), "mlp_bias": (False,), "attention_chunk_size": ()},
)


def _read(raw: Mapping[str, Any]) -> dict[str, Any]:
    experts = Experts(count=raw["num_local_experts"], per_token=raw["num_experts_per_tok"], intermediate_size=raw["intermediate_size"])
    return {"experts": experts, **read_uniform_window(raw, raw.get("sliding_window"))}


ARCHITECTURE = Architecture(
    model_type="mixtral",
    class_names=("MixtralForCausalLM", "MixtralModel"),
    keys=KEYS,
    defaults={
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    read=_read,
    gguf=GgufNames(
        architecture="llama",
        interleaved=True,
        sizes={"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"},
    ),
    experts=ExpertNames(
        router="block_sparse_moe.gate",
        gate="block_sparse_moe.experts.{}.w1",
        up="block_sparse_moe.experts.{}.w3",
        down="block_sparse_moe.experts.{}.w2",
    ),
)
