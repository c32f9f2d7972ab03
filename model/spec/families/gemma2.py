"""Gemma 2: norms around attention and feed-forward, GELU, limited scores and logits, a window in every other layer."""

from collections.abc import Mapping
from typing import Any

from model.spec.architecture import Architecture
from model.spec.config_keys import CONFIG_KEYS
from model.spec.quoting import quote
from model.spec.windows import FULL, SLIDING, read_windows
from parallel.errors import ConfigError

READ = (
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "hidden_activation",
    "layer_types",
    "query_pre_attn_scalar",
)
IGNORED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("gelu_pytorch_tanh", "gelu"),
    "mlp_bias": (False,),
    "attention_chunk_size": (),
}
FIXED: dict[str, tuple[Any, ...]] = {"use_bidirectional_attention": (False,)}
FEATURES: dict[str, Any] = {"norm_offset": True, "sandwich_norms": True, "hidden_act": "gelu_tanh"}


def read_layers(raw: Mapping[str, Any], pattern: int) -> dict[str, Any]:
    """Return the fields of LlamaConfig that Gemma 2 and 3 share; every `pattern`-th layer has no window."""
    if raw["hidden_activation"] != "gelu_pytorch_tanh":
        raise ConfigError(f"hidden_activation is {quote(raw['hidden_activation'])}, but only 'gelu_pytorch_tanh' is supported")
    sizes = (raw["query_pre_attn_scalar"], raw["hidden_size"], raw["num_hidden_layers"], raw["head_dim"])
    if not all(type(size) in (int, float) and size > 0 for size in sizes):
        raise ConfigError(f"query_pre_attn_scalar, hidden_size, num_hidden_layers, head_dim are {list(sizes)}: positive numbers are needed")
    scalar, hidden, layers, width = sizes
    types = [FULL if (index + 1) % pattern == 0 else SLIDING for index in range(min(int(layers), 100_000))]
    biased = raw.get("attention_bias") or False
    return {
        "attention_bias": biased,
        "output_bias": biased,
        "embedding_scale": hidden**0.5,
        "query_scale": 1.0 if scalar == width else (width / scalar) ** 0.5,
        "attention_softcap": raw.get("attn_logit_softcapping"),
        "logit_softcap": raw.get("final_logit_softcapping"),
        **read_windows(raw, raw.get("sliding_window"), types),
    }


def _read(raw: Mapping[str, Any]) -> dict[str, Any]:
    return read_layers(raw, 2)


DEFAULTS: dict[str, Any] = {
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
ARCHITECTURE = Architecture(
    model_type="gemma2",
    class_names=("Gemma2ForCausalLM", "Gemma2Model"),
    keys=CONFIG_KEYS.adapt("config.json of gemma2", read=READ, ignored=IGNORED, fixed=FIXED, harmless=("cache_implementation",)),
    defaults={**DEFAULTS, "max_position_embeddings": 8192, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    features=FEATURES,
    read=_read,
)
