"""Plans of published models of every family: exact bytes, and fast, from their config.json alone."""

import time
from typing import Any

import pytest
import torch
import transformers

from model.planning import Workload, plan_ranks
from model.spec.config import build_config
from model.spec.linear_scheme import LinearScheme
from model.spec.scheme import Scheme

_QWEN3 = {"rms_norm_eps": 1e-6, "rope_theta": 1e6, "head_dim": 128, "vocab_size": 151936, "torch_dtype": "bfloat16"}
PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {
    # name: (sizes in its config.json, parameters in its safetensors files)
    "Llama-2-70B": (
        {
            "model_type": "llama",
            "hidden_size": 8192,
            "intermediate_size": 28672,
            "num_hidden_layers": 80,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "vocab_size": 32000,
            "torch_dtype": "float16",
        },
        68_976_648_192,
    ),
    "Llama-3.1-70B": (
        {
            "model_type": "llama",
            "hidden_size": 8192,
            "intermediate_size": 28672,
            "num_hidden_layers": 80,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "vocab_size": 128256,
            "torch_dtype": "bfloat16",
        },
        70_553_706_496,
    ),
    "Qwen2.5-72B": (
        {
            "model_type": "qwen2",
            "hidden_size": 8192,
            "intermediate_size": 29568,
            "num_hidden_layers": 80,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "vocab_size": 152064,
            "max_window_layers": 70,
            "use_sliding_window": False,
            "torch_dtype": "bfloat16",
        },
        72_706_203_648,
    ),
    "Qwen3-32B": (
        {
            **_QWEN3,
            "model_type": "qwen3",
            "hidden_size": 5120,
            "intermediate_size": 25600,
            "num_hidden_layers": 64,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
        },
        32_762_123_264,
    ),
    "Qwen3-30B-A3B": (
        {
            **_QWEN3,
            "model_type": "qwen3_moe",
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "moe_intermediate_size": 768,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "norm_topk_prob": True,
            "num_hidden_layers": 48,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
        },
        30_532_122_624,
    ),
    "Mixtral-8x7B": (
        {
            "model_type": "mixtral",
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 32000,
            "torch_dtype": "bfloat16",
        },
        46_702_792_704,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_model_has_its_published_bytes(name: str) -> None:
    values, parameters = PUBLISHED[name]
    config, workload = build_config(values), Workload(dtype="bfloat16", tokens=4096)
    started = time.process_time()
    alone, eight = (plan_ranks(config, Scheme(), world_size, workload) for world_size in (1, 8))
    int8 = plan_ranks(config, Scheme(LinearScheme(), ("lm_head",)), 8, workload)
    assert time.process_time() - started < 1
    assert alone[0].file_bytes == 2 * parameters
    # Norms, routers and KV heads with fewer heads than ranks are on several ranks.
    whole = alone[0].weight_bytes
    assert 0 <= sum(plan.weight_bytes for plan in eight) - whole < whole / 50
    assert max(plan.weight_bytes for plan in int8) < 0.6 * max(plan.weight_bytes for plan in eight)
    assert config.experts is None or alone[0].streamed_bytes < whole / 2
    with torch.device("meta"):
        reference = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**values))
    assert sum(parameter.numel() for parameter in reference.parameters()) == parameters
