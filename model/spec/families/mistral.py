"""Mistral 7B to Large and Ministral 8B: Llama with a window in every layer, up to version 0.1."""

from collections.abc import Mapping
from typing import Any

from model.spec.architecture import Architecture
from model.spec.config_keys import CONFIG_KEYS
from model.spec.windows import read_uniform_window

KEYS = CONFIG_KEYS.adapt(
    "config.json of mistral",
    read=("layer_types",),
    ignored={"attention_bias": (False,), "mlp_bias": (False,), "attention_chunk_size": ()},
)


def _read(raw: Mapping[str, Any]) -> dict[str, Any]:
    return read_uniform_window(raw, raw.get("sliding_window"))


ARCHITECTURE = Architecture(
    model_type="mistral",
    class_names=("MistralForCausalLM", "MistralModel"),
    keys=KEYS,
    defaults={"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
    read=_read,
)
