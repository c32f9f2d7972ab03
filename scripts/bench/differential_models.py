"""Random small Llama models for the differential test: the values of a config.json, and weights whose logits tell tokens apart.

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
    }


def list_linears(values: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of every linear of the layers by its full name."""
    sizes = count_sizes(values)
    return {
        f"model.layers.{layer}.{name}": (sizes[rows], sizes[columns])
        for layer in range(values["num_hidden_layers"])
        for name, (rows, columns) in LINEARS.items()
    }


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
    if limits.biases:
        values |= {"attention_bias": random.random() < 0.3, "mlp_bias": random.random() < 0.2}
    return values | _draw_rope(random, random.choice(limits.ropes), yarn_details=limits.yarn_details)


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


def _draw_tensors(values: Mapping[str, Any], seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden, vocab = values["hidden_size"], values["vocab_size"]

    def normal(*shape: int, scale: float) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * scale

    tensors = {"model.embed_tokens.weight": normal(vocab, hidden, scale=3 * hidden**-0.5)}
    for name, (rows, columns) in list_linears(values).items():
        tensors[f"{name}.weight"] = normal(rows, columns, scale=1.5 * columns**-0.5)
        if values.get("attention_bias" if "attn" in name else "mlp_bias"):
            tensors[f"{name}.bias"] = normal(rows, scale=0.5)
    for layer in range(values["num_hidden_layers"]):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{norm}.weight"] = 0.5 + torch.rand(hidden, generator=generator)
    tensors["model.norm.weight"] = 0.5 + torch.rand(hidden, generator=generator)
    tied = values["tie_word_embeddings"]
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] if tied else normal(vocab, hidden, scale=3 * hidden**-0.5)
    return tensors
