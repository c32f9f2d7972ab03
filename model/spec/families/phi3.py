"""Phi-3 and Phi-3.5 mini with short contexts: Mistral, with linears of the same input stored as one."""

from collections.abc import Mapping
from typing import Any

from model.spec.architecture import Architecture, GgufNames
from model.spec.config_keys import CONFIG_KEYS
from model.spec.quoting import quote
from model.spec.windows import read_uniform_window
from parallel.errors import ConfigError

KEYS = CONFIG_KEYS.adapt(
    "config.json of phi3",
    read=("layer_types",),
    ignored={"attention_bias": (False,), "mlp_bias": (False,), "attention_chunk_size": ()},
)


def _read(raw: Mapping[str, Any]) -> dict[str, Any]:
    for key in ("rope_scaling", "rope_parameters"):
        section = raw.get(key)
        kind = (section.get("rope_type") or section.get("type") or "default") if isinstance(section, Mapping) else "default"
        if kind != "default":
            raise ConfigError(f"{key} {quote(kind)} is not supported with model_type 'phi3': take a model with a short context (4k)")
    return read_uniform_window(raw, raw.get("sliding_window"))


ARCHITECTURE = Architecture(
    model_type="phi3",
    class_names=("Phi3ForCausalLM", "Phi3Model"),
    keys=KEYS,
    # Also written to the config of the unfused model, so every default that differs from Mistral's is here.
    defaults={"max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "eos_token_id": 32000, "pad_token_id": 32000, "sliding_window": None},
    read=_read,
    fused={
        "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
    },
    stored_as="mistral",
    gguf=GgufNames(
        architecture="phi3",
        layer={"attn_qkv.weight": "self_attn.qkv_proj.weight", "ffn_up.weight": "mlp.gate_up_proj.weight"},
        optional={"attention.sliding_window": "sliding_window"},
    ),
)
