"""Write a random model as GGUF, MindSpore `.ckpt` and Meta files: formats whose names, row orders and settings differ from Hugging Face's.

Each writer gives the path, the float32 weights that were stored, and the options to open them with.
"""

import json
import random
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from differential_models import DrawnModel, list_linears
from differential_packing import round_weight

Tensors = dict[str, torch.Tensor]
_GGUF_TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1")
_MINDFORMERS = {
    "model.embed_tokens.weight": "model.tok_embeddings.embedding_weight",
    "model.norm.weight": "model.norm_out.weight",
    ".self_attn.q_proj.": ".attention.wq.",
    ".self_attn.k_proj.": ".attention.wk.",
    ".self_attn.v_proj.": ".attention.wv.",
    ".self_attn.o_proj.": ".attention.wo.",
    ".mlp.gate_proj.": ".feed_forward.w1.",
    ".mlp.down_proj.": ".feed_forward.w2.",
    ".mlp.up_proj.": ".feed_forward.w3.",
    ".input_layernorm.": ".attention_norm.",
    ".post_attention_layernorm.": ".ffn_norm.",
}
_META = {
    "model.embed_tokens.": "tok_embeddings.",
    "lm_head.": "output.",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.": "",
}


def _rename(name: str, words: Mapping[str, str]) -> str:
    for old, new in words.items():
        name = name.replace(old, new)
    return name


def _interleave(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of each head in Meta's and llama.cpp's order: the two of a rotary pair next to each other."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _deinterleave(weight: torch.Tensor, heads: int) -> torch.Tensor:
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def _count_heads(values: Mapping[str, Any], name: str) -> int:
    """Heads of a linear that rotary embedding turns, else 0."""
    return values["num_attention_heads"] if "q_proj" in name else values["num_key_value_heads"] if "k_proj" in name else 0


def write_gguf(folder: Path, model: DrawnModel, random: random.Random) -> tuple[Path, Tensors, dict[str, Any]]:
    """Matrices of one type or of mixed types; rope settings under the current keys."""
    values, path = model.values, folder / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(values["max_position_embeddings"])
    writer.add_embedding_length(values["hidden_size"])
    writer.add_block_count(values["num_hidden_layers"])
    writer.add_feed_forward_length(values["intermediate_size"])
    writer.add_head_count(values["num_attention_heads"])
    writer.add_head_count_kv(values["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(values["rms_norm_eps"])
    if values["head_dim"] * values["num_attention_heads"] != values["hidden_size"] or random.random() < 0.5:
        writer.add_key_length(values["head_dim"])
        writer.add_value_length(values["head_dim"])
        writer.add_rope_dimension_count(values["head_dim"])
    section = values.get("rope_parameters") or {**(values.get("rope_scaling") or {}), "rope_theta": values["rope_theta"]}
    writer.add_rope_freq_base(section["rope_theta"])
    if section.get("rope_type", "default") != "default":
        writer.add_rope_scaling_type(gguf.RopeScalingType(section["rope_type"]))
        writer.add_rope_scaling_factor(section["factor"])
        if "original_max_position_embeddings" in section:
            writer.add_rope_scaling_orig_ctx_len(section["original_max_position_embeddings"])
    one = random.choice((*_GGUF_TYPES, None))
    names, weights = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, values["num_hidden_layers"]), {}
    for name, tensor in model.tensors.items():
        if name == "lm_head.weight" and values["tie_word_embeddings"]:
            continue
        kind = gguf.GGMLQuantizationType[one or random.choice(_GGUF_TYPES)] if tensor.dim() > 1 else gguf.GGMLQuantizationType.F32
        heads = _count_heads(values, name)
        data = (_interleave(tensor, heads) if heads else tensor).contiguous().numpy()
        stored = gguf.quants.quantize(data, kind)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), stored, raw_dtype=kind)
        found = torch.from_numpy(np.ascontiguousarray(gguf.quants.dequantize(stored, kind))).float().reshape(tensor.shape)
        weights[name] = _deinterleave(found, heads) if heads else found
    weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, weights, {}


def write_mindspore(folder: Path, model: DrawnModel, random: random.Random) -> tuple[Path, Tensors, dict[str, Any]]:
    """Separate or fused linears in both row orders, floats or Golden Stick's int8, whole or cut for two ranks."""
    values, weights, tensors = model.values, dict(model.tensors), dict[str, torch.Tensor]()
    quantized, order = random.random() < 0.4, random.choice((None, "1.3", "1.4"))
    linears = list_linears(values)
    for name, tensor in model.tensors.items():
        linear, target = name.removesuffix(".weight"), _rename(name, _MINDFORMERS)
        if quantized and linear in linears:
            rounded = round_weight(tensor, 8, -1, symmetric=True, scale_dtype=torch.float32)
            weights[name], target = rounded.weight, target.removesuffix(".weight")
            tensors[f"{target}._handler.weight"] = (rounded.integers - 128).to(torch.int8)
            tensors[f"{target}._weight_quantizer.scale"] = rounded.scales[:, 0].contiguous()
            tensors[f"{target}._weight_quantizer.zp_neg"] = torch.zeros(len(tensor))
        else:
            tensors[target] = tensor
    if order:
        tensors = _fuse(tensors, values, order)
    path = folder / "m.ckpt"
    path.write_bytes(_encode(tensors, random))
    (folder / "config.json").write_text(json.dumps(values))
    return path, weights, {"fused_order": order} if order else {}


def _fuse(tensors: Tensors, values: Mapping[str, Any], order: str) -> Tensors:
    fused = {"attention.w_qkv": ("attention.wq", "attention.wk", "attention.wv")}
    fused["feed_forward.w_gate_hidden"] = ("feed_forward.w1", "feed_forward.w3")
    for layer in range(values["num_hidden_layers"]):
        for target, parts in fused.items():
            first = f"model.layers.{layer}.{parts[0]}."
            for rest in [name.removeprefix(first) for name in tensors if name.startswith(first)]:
                rows = [tensors.pop(f"model.layers.{layer}.{part}.{rest}") for part in parts]
                if order == "1.4":
                    count = values["num_key_value_heads"] if len(parts) == 3 else len(rows[0])
                    joined = torch.cat([part.unflatten(0, (count, -1)) for part in rows], dim=1).flatten(0, 1)
                else:
                    joined = torch.cat(rows)
                tensors[f"model.layers.{layer}.{target}.{rest}"] = joined.contiguous()
    return tensors


def _encode(tensors: Tensors, random: random.Random) -> bytes:
    """MindSpore's protobuf: repeated values of tag and tensor (dims, type, content), then a checksum or none."""
    words, out = {torch.float32: "Float32", torch.int8: "Int8"}, b""
    for tag, tensor in tensors.items():
        content = tensor.contiguous().numpy().tobytes()
        dims = b"".join(b"\x08" + _varint(size) for size in tensor.shape)
        inner = dims + _field(2, words[tensor.dtype].encode()) + _field(3, content)
        out += _field(1, _field(1, tag.encode()) + _field(2, inner))
    return out + (b"crc_num" + zlib.crc32(out).to_bytes(10, "big") if random.random() < 0.5 else b"")


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _field(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def write_meta(folder: Path, model: DrawnModel, random: random.Random) -> tuple[Path, Tensors, dict[str, Any]]:
    """One file, or two where the heads divide; the embedding is cut by columns (Llama 2) or rows (Llama 3)."""
    values, dtype = model.values, random.choice((torch.float32, torch.float16, torch.bfloat16))
    section = values.get("rope_parameters") or {"rope_theta": values["rope_theta"]}
    even = values["vocab_size"] % 2 == 0 and values["num_key_value_heads"] % 2 == 0
    parts = 2 if even and values["intermediate_size"] % 2 == 0 and random.random() < 0.6 else 1
    embedding = random.choice((0, 1))
    files: list[Tensors] = [{} for _ in range(parts)]
    weights = {name: tensor.to(dtype).float() for name, tensor in model.tensors.items()}
    for name, tensor in weights.items():
        if name == "lm_head.weight" and values["tie_word_embeddings"]:
            continue
        heads = _count_heads(values, name)
        rows = (_interleave(tensor, heads) if heads else tensor).to(dtype)
        axis = embedding if "embed" in name else 1 if "o_proj" in name or "down_proj" in name else 0
        for file, part in zip(files, [rows] * parts if tensor.dim() == 1 else rows.chunk(parts, axis), strict=True):
            file[_rename(name, _META)] = part.clone()
    for place, file in enumerate(files):
        torch.save(file, folder / f"consolidated.{place:02d}.pth")
    params: dict[str, Any] = {"dim": values["hidden_size"], "n_layers": values["num_hidden_layers"], "multiple_of": 16}
    params |= {"n_heads": values["num_attention_heads"], "n_kv_heads": values["num_key_value_heads"], "norm_eps": values["rms_norm_eps"]}
    params |= {"vocab_size": random.choice((-1, values["vocab_size"])), "rope_theta": section["rope_theta"]}
    (folder / "params.json").write_text(json.dumps(params))
    return folder, weights, {}
