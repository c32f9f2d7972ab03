"""Llama 1 to 3.3, CodeLlama, and the many models with the same layers."""

from collections.abc import Mapping
from typing import Any

from model.spec.architecture import Architecture, GgufNames
from model.spec.config_keys import CONFIG_KEYS
from model.spec.quoting import quote
from parallel.errors import ConfigError


def _read(raw: Mapping[str, Any]) -> dict[str, Any]:
    _check_windows(raw)
    biased = raw.get("attention_bias") or False
    return {"attention_bias": biased, "output_bias": biased, "mlp_bias": raw.get("mlp_bias") or False}


def _check_windows(raw: Mapping[str, Any]) -> None:
    """Raise ConfigError where attention sees a part of the context. transformers cuts its cache there, and vLLM masks it."""
    if raw.get("layer_types"):
        return  # every layer is "full_attention", whatever the window
    for key in ("sliding_window", "attention_chunk_size"):
        value, context = raw.get(key), raw.get("max_position_embeddings") or 2048
        if value is not None and (type(value) is not int or value < context):
            raise ConfigError(
                f"{key} is {quote(value)}, but max_position_embeddings is {context}: attention over a window is not supported with "
                f"model_type 'llama'; set {key} to null if the model attends to its whole context"
            )


ARCHITECTURE = Architecture(
    model_type="llama",
    class_names=("LlamaForCausalLM", "LLaMAForCausalLM", "LlamaModel"),
    keys=CONFIG_KEYS,
    read=_read,
    gguf=GgufNames(architecture="llama", interleaved=True),
    mindformers=("LlamaConfig", "LlamaForCausalLM", "ParallelLlamaForCausalLM"),
)
