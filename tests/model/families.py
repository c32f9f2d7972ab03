"""Tiny random models of every family, written by transformers: odd head counts, heads of another width than hidden_size / heads, groups
of 1 to 8 query heads, windows shorter than the prompts, several experts.
"""

from pathlib import Path
from typing import Any

import torch
import transformers

SHAPE: dict[str, Any] = {"num_hidden_layers": 2, "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "initializer_range": 0.12}
ODD = {"hidden_size": 96, "intermediate_size": 112, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 16, "vocab_size": 97}
WIDE = {"hidden_size": 80, "intermediate_size": 144, "num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 8, "vocab_size": 130}
EVEN = {"hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 6, "num_key_value_heads": 6, "vocab_size": 80}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    # name: (model_type, values of its config)
    "mistral": ("mistral", {**WIDE, "head_dim": 22, "sliding_window": 7}),
    "mistral-full": ("mistral", {**WIDE, "sliding_window": None}),
    "qwen2": ("qwen2", {**EVEN, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen2-tied": ("qwen2", {**EVEN, "num_attention_heads": 6, "num_key_value_heads": 2, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", {**ODD, "attention_bias": True}),
    "qwen3-plain": ("qwen3", {**ODD, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "qwen3-window": ("qwen3", {**WIDE, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
    "phi3": ("phi3", {**EVEN, "num_key_value_heads": 3, "sliding_window": 9, "pad_token_id": 79}),
    "gemma2": (
        "gemma2",
        {**WIDE, "num_key_value_heads": 2, "head_dim": 20, "query_pre_attn_scalar": 11, "sliding_window": 6, "pad_token_id": 79},
    ),
    "gemma3_text": (
        "gemma3_text",
        {
            **ODD,
            "hidden_size": 144,
            "query_pre_attn_scalar": 20,
            "pad_token_id": 79,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        },
    ),
    "mixtral": ("mixtral", {**ODD, "num_local_experts": 8, "num_experts_per_tok": 2}),
    "mixtral-window": ("mixtral", {**EVEN, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 9}),
    "qwen3_moe": (
        "qwen3_moe",
        {**WIDE, "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 112, "norm_topk_prob": True},
    ),
    "qwen3_moe-plain": (
        "qwen3_moe",
        {**ODD, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "mlp_only_layers": [1]},
    ),
}


def write_model(folder: Path, name: str, seed: int = 3) -> Path:
    """Write the model `name` as a float32 checkpoint."""
    kind, values = MODELS[name]
    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(kind, **{**SHAPE, **values})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter_name, parameter in model.named_parameters():
        if "norm" in parameter_name or parameter_name.endswith(".bias"):
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.save_pretrained(folder)
    return folder
