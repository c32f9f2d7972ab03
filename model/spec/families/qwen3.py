"""Qwen 3: normalized heads of queries and keys, whose width does not follow from hidden_size."""

from collections.abc import Mapping
from typing import Any

from model.spec.architecture import Architecture, GgufNames
from model.spec.config_keys import CONFIG_KEYS
from model.spec.windows import read_late_windows

WINDOW_KEYS = ("layer_types", "max_window_layers", "use_sliding_window")
NORMS = {"attn_q_norm.weight": "self_attn.q_norm.weight", "attn_k_norm.weight": "self_attn.k_norm.weight"}


def _read(raw: Mapping[str, Any]) -> dict[str, Any]:
    biased = raw.get("attention_bias") or False
    return {"attention_bias": biased, "output_bias": biased, **read_late_windows(raw)}


ARCHITECTURE = Architecture(
    model_type="qwen3",
    class_names=("Qwen3ForCausalLM", "Qwen3Model"),
    keys=CONFIG_KEYS.adapt("config.json of qwen3", read=WINDOW_KEYS, ignored={"mlp_bias": (False,), "attention_chunk_size": ()}),
    defaults={
        "num_key_value_heads": 32,
        "head_dim": 128,
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
        "max_window_layers": 28,
        "bos_token_id": None,
        "eos_token_id": None,
    },
    features={"qk_norm": True},
    read=_read,
    gguf=GgufNames(architecture="qwen3", layer=NORMS),
    mindformers=("Qwen3Config", "Qwen3ForCausalLM"),
)
