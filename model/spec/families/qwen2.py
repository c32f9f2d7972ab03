"""Qwen 2 and 2.5: Llama with biases of queries, keys and values, and a window in late layers where it is switched on."""

from model.spec.architecture import Architecture, GgufNames
from model.spec.config_keys import CONFIG_KEYS
from model.spec.windows import read_late_windows

WINDOW_KEYS = ("layer_types", "max_window_layers", "use_sliding_window")

ARCHITECTURE = Architecture(
    model_type="qwen2",
    class_names=("Qwen2ForCausalLM", "Qwen2Model"),
    keys=CONFIG_KEYS.adapt(
        "config.json of qwen2",
        read=WINDOW_KEYS,
        ignored={"attention_bias": (True,), "mlp_bias": (False,), "attention_chunk_size": ()},
        harmless=("use_mrope",),
    ),
    defaults={
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
        "max_window_layers": 28,
        "bos_token_id": None,
        "eos_token_id": None,
    },
    features={"attention_bias": True},
    read=read_late_windows,
    gguf=GgufNames(
        architecture="qwen2",
        layer={f"attn_{short}.bias": f"self_attn.{short}_proj.bias" for short in ("q", "k", "v")},
    ),
    # MindFormers up to 1.6 runs Qwen 2 as LlamaConfig with qkv_has_bias.
    mindformers=("LlamaConfig", "Qwen2Config", "LlamaForCausalLM", "Qwen2ForCausalLM"),
)
