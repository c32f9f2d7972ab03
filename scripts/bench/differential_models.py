"""Random small models of every family for the differential test: the values of a config.json, and weights whose logits tell tokens apart.

Depends on Hugging Face's names only; does not use the project's own reading of them.
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

LINEARS = {
    "self_attn.q_proj": ("queries", "hidden_size"),
    "self_attn.k_proj": ("keys", "hidden_size"),
    "self_attn.v_proj": ("keys", "hidden_size"),
    "self_attn.o_proj": ("hidden_size", "queries"),
    "mlp.gate_proj": ("intermediate_size", "hidden_size"),
    "mlp.up_proj": ("intermediate_size", "hidden_size"),
    "mlp.down_proj": ("hidden_size", "intermediate_size"),
}
"""Sizes of outputs and inputs by the linear's name in its layer."""
FUSED_LINEARS = {
    "self_attn.qkv_proj": ("queries and keys and values", "hidden_size"),
    "self_attn.o_proj": ("hidden_size", "queries"),
    "mlp.gate_up_proj": ("both halves", "hidden_size"),
    "mlp.down_proj": ("hidden_size", "intermediate_size"),
}
"""The same of phi3."""
EXPERTS = {
    "mixtral": ("block_sparse_moe.experts.{}.w1", "block_sparse_moe.experts.{}.w3", "block_sparse_moe.experts.{}.w2"),
    "qwen3_moe": ("mlp.experts.{}.gate_proj", "mlp.experts.{}.up_proj", "mlp.experts.{}.down_proj"),
}
"""Names of an expert's linears by family."""
ROUTERS = {"mixtral": "block_sparse_moe.gate", "qwen3_moe": "mlp.gate"}
FAMILIES = ("llama", "llama", "mistral", "qwen2", "qwen3", "phi3", "gemma2", "gemma3_text", "mixtral", "qwen3_moe")
ROPES = ("default", "linear", "llama3", "yarn", "dynamic")
_CONTEXT = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Restrictions of a format."""

    inputs: int = 1
    """Inputs of every linear are a multiple of this."""
    outputs: int = 1
    """Outputs of every linear are a multiple of this."""
    ropes: tuple[str, ...] = ROPES
    biases: bool = True
    tied: bool = True
    families: tuple[str, ...] = FAMILIES
    head_dims: bool = True
    """Heads may have another width than hidden_size / num_attention_heads."""
    yarn_details: bool = True
    """The scaling "yarn" may have other constants than the usual ones."""


@dataclass(frozen=True, slots=True)
class DrawnModel:
    """One model."""

    values: dict[str, Any]
    """Of its config.json, without quantization."""
    tensors: dict[str, torch.Tensor]
    """float32, in Hugging Face's names; the output head is included, tied or not."""


def draw_model(random: random.Random, limits: Limits) -> DrawnModel:
    """A model of one or two layers that has a unit of every split dimension for each of three ranks."""
    values = _draw_values(random, limits)
    return DrawnModel(values, _draw_tensors(values, random.getrandbits(31)))


def count_sizes(values: Mapping[str, Any]) -> dict[str, int]:
    """Sizes by the words of LINEARS."""
    width = values["head_dim"]
    return {
        "queries": values["num_attention_heads"] * width,
        "keys": values["num_key_value_heads"] * width,
        "hidden_size": values["hidden_size"],
        "intermediate_size": values["intermediate_size"],
        "queries and keys and values": (values["num_attention_heads"] + 2 * values["num_key_value_heads"]) * width,
        "both halves": 2 * values["intermediate_size"],
    }


def list_linears(values: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of every linear of the layers by its full name."""
    sizes, kind = count_sizes(values), values["model_type"]
    linears = {name: (sizes[rows], sizes[columns]) for name, (rows, columns) in (FUSED_LINEARS if kind == "phi3" else LINEARS).items()}
    if kind in EXPERTS:
        linears = {name: size for name, size in linears.items() if "self_attn" in name}
        hidden, width = values["hidden_size"], values.get("moe_intermediate_size", values["intermediate_size"])
        for number in range(count_experts(values)):
            gate, up, down = (name.format(number) for name in EXPERTS[kind])
            linears |= {gate: (width, hidden), up: (width, hidden), down: (hidden, width)}
    return {f"model.layers.{layer}.{name}": size for layer in range(values["num_hidden_layers"]) for name, size in linears.items()}


def count_experts(values: Mapping[str, Any]) -> int:
    """Experts of a layer; 0 for a single feed-forward."""
    found: int = values.get("num_experts") or values.get("num_local_experts") or 0
    return found


def _draw_values(random: random.Random, limits: Limits) -> dict[str, Any]:
    while True:
        kv_heads, shared = random.choice((1, 1, 2, 3, 3, 4, 5, 7)), random.choice((1, 1, 2, 3, 4, 5, 7, 8))
        heads = kv_heads * shared
        width = 2 * random.randint(2, 24)
        hidden = random.randint(3, 12) * 16 if random.random() < 0.7 else random.randint(40, 160)
        if not limits.head_dims or random.random() < 0.3:
            hidden = heads * width
        inner = random.randint(3, 14) * 16 if random.random() < 0.6 else random.randint(40, 220)
        sizes = (hidden, heads * width, kv_heads * width, inner)
        if not 3 <= heads <= 24 or not 36 <= hidden <= 256 or heads * width > 256:
            continue
        if all(size % limits.outputs == 0 for size in sizes) and all(sizes[place] % limits.inputs == 0 for place in (0, 1, 3)):
            break
    values: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": random.choice((1, 2, 2, 3)),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": width,
        "vocab_size": random.randint(49, 400),
        "max_position_embeddings": _CONTEXT,
        "rms_norm_eps": random.choice((1e-6, 1e-5, 1e-3, 3e-2)),
        "tie_word_embeddings": limits.tied and random.random() < 0.3,
        "bos_token_id": 1,
        "pad_token_id": None,
        "torch_dtype": "float32",
    }
    kind = random.choice(limits.families)
    if kind != "llama":
        return values | _draw_family(random, kind, values, inner)
    if limits.biases:
        values |= {"attention_bias": random.random() < 0.3, "mlp_bias": random.random() < 0.2}
    return values | _draw_rope(random, random.choice(limits.ropes), yarn_details=limits.yarn_details)


def _draw_family(random: random.Random, kind: str, values: Mapping[str, Any], inner: int) -> dict[str, Any]:
    """What another family than Llama has."""
    # With a window of 1, the cache of transformers keeps all tokens.
    window, layers = random.choice((None, random.randint(2, 40), random.randint(2, 9))), values["num_hidden_layers"]
    name = {"phi3": "Phi3", "qwen3_moe": "Qwen3Moe", "gemma3_text": "Gemma3"}.get(kind, kind.capitalize())
    found: dict[str, Any] = {"model_type": kind, "architectures": [f"{name}ForCausalLM"], "rope_theta": random.choice((10000.0, 1e6))}
    if kind in ("mistral", "mixtral", "phi3"):
        found["sliding_window"] = window
    elif kind in ("qwen2", "qwen3"):
        found |= {"use_sliding_window": window is not None, "sliding_window": window, "max_window_layers": random.randint(0, layers)}
    elif kind == "qwen3_moe":
        found |= {"use_sliding_window": window is not None, "sliding_window": window, "norm_topk_prob": random.random() < 0.5}
    else:
        found |= {"sliding_window": window or 12, "query_pre_attn_scalar": random.choice((values["head_dim"], 24))}
        found |= {"hidden_activation": "gelu_pytorch_tanh", "hidden_act": "gelu_pytorch_tanh"}
        found["layer_types"] = [random.choice(("full_attention", "sliding_attention")) for _ in range(layers)]
    if kind == "gemma2":
        found |= {"attn_logit_softcapping": random.choice((50.0, 3.0)), "final_logit_softcapping": random.choice((30.0, None))}
    if kind == "gemma3_text":
        own = {
            "full_attention": {"rope_type": "default", "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        }
        found = {key: value for key, value in found.items() if key != "rope_theta"} | {"rope_parameters": own}
    if kind in ("qwen3", "qwen3_moe", "gemma2", "gemma3_text"):
        found["attention_bias"] = random.random() < 0.3
    count = random.choice((2, 4, 8))
    if kind == "mixtral":
        found |= {"num_local_experts": count, "num_experts_per_tok": random.randint(1, 2)}
    if kind == "qwen3_moe":
        found |= {"num_experts": count, "num_experts_per_tok": random.randint(1, 2), "moe_intermediate_size": inner}
    return found


def _draw_rope(random: random.Random, kind: str, *, yarn_details: bool) -> dict[str, Any]:
    theta = random.choice((10000.0, 500000.0, 1000.0, 12345.5))
    section: dict[str, Any] = {"rope_type": kind}
    if kind == "linear":
        section["factor"] = random.choice((2.0, 4.0, 1.5))
    elif kind == "dynamic":
        section["factor"] = 2.0
    elif kind == "llama3":
        section |= {"factor": random.choice((8.0, 32.0)), "low_freq_factor": 1.0, "high_freq_factor": random.choice((4.0, 2.0))}
        section["original_max_position_embeddings"] = random.choice((16, 32, 64))
    elif kind == "yarn":
        section |= {"factor": random.choice((2.0, 4.0)), "original_max_position_embeddings": random.choice((32, 64))}
        if yarn_details and random.random() < 0.4:
            section |= {"beta_fast": 16.0, "beta_slow": 2.0}
        if yarn_details and random.random() < 0.3:
            section["attention_factor"] = 1.2
    if kind == "default" and random.random() < 0.5:
        return {"rope_theta": theta}
    if random.random() < 0.5:
        return {"rope_parameters": {**section, "rope_theta": theta}}
    return {"rope_theta": theta, "rope_scaling": section}


def _list_norms(values: Mapping[str, Any]) -> dict[str, int]:
    """Sizes of a layer's norms."""
    norms = ["input_layernorm", "post_attention_layernorm"]
    if values["model_type"].startswith("gemma"):
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    heads = ["self_attn.q_norm", "self_attn.k_norm"] if values["model_type"] in ("qwen3", "qwen3_moe", "gemma3_text") else []
    return dict.fromkeys(norms, values["hidden_size"]) | dict.fromkeys(heads, values["head_dim"])


def _draw_tensors(values: Mapping[str, Any], seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden, vocab, kind = values["hidden_size"], values["vocab_size"], values["model_type"]
    least = -0.5 if kind.startswith("gemma") else 0.5

    def normal(*shape: int, scale: float) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * scale

    tensors = {"model.embed_tokens.weight": normal(vocab, hidden, scale=3 * hidden**-0.5)}
    for name, (rows, columns) in list_linears(values).items():
        tensors[f"{name}.weight"] = normal(rows, columns, scale=1.5 * columns**-0.5)
        biased = values.get("attention_bias" if "attn" in name else "mlp_bias")
        if biased or (values["model_type"] == "qwen2" and "self_attn" in name and "o_proj" not in name):
            tensors[f"{name}.bias"] = normal(rows, scale=0.5)
    for layer in range(values["num_hidden_layers"]):
        for norm, size in _list_norms(values).items():
            tensors[f"model.layers.{layer}.{norm}.weight"] = least + torch.rand(size, generator=generator)
        if kind in ROUTERS:
            tensors[f"model.layers.{layer}.{ROUTERS[kind]}.weight"] = normal(count_experts(values), hidden, scale=2 * hidden**-0.5)
    tensors["model.norm.weight"] = least + torch.rand(hidden, generator=generator)
    tied = values["tie_word_embeddings"]
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] if tied else normal(vocab, hidden, scale=3 * hidden**-0.5)
    return tensors
