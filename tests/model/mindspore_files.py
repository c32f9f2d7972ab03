"""MindSpore checkpoints made here byte by byte: a writer of `.ckpt`, tensors of a small Llama in every form, fused, cut for ranks."""

import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from model.checkpoint.mindspore_file import MindSporeFile
from model.checkpoint.mindspore_header import TYPE_NAMES
from model.checkpoint.mindspore_rows import decode_dequant_scale
from model.spec.config import build_config
from model.spec.linear_scheme import LinearScheme
from model.spec.scheme import read_scheme
from model.spec.weights import compare_tensors, plan_weights
from parallel.element_type import ElementType
from parallel.file_slices import FileReader

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}
"""Of the samples in golden_stick."""
LINEARS = {
    "attention.wq": (64, 64),
    "attention.wk": (32, 64),
    "attention.wv": (32, 64),
    "attention.wo": (64, 64),
    "feed_forward.w1": (176, 64),
    "feed_forward.w2": (64, 176),
    "feed_forward.w3": (176, 64),
}
HF_NAMES = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
}
FUSED = {
    "attention.w_qkv": ("attention.wq", "attention.wk", "attention.wv"),
    "feed_forward.w_gate_hidden": ("feed_forward.w1", "feed_forward.w3"),
}
A8W8 = LinearScheme(packed=False, activation="tensor", activation_symmetric=False, smooth=True)


# ---- a writer of the format


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def field(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


def entry(tag: str, dims: Sequence[int], tensor_type: str, content: bytes, *, packed: bool = False) -> bytes:
    sizes = field(1, b"".join(map(varint, dims))) if packed else b"".join(b"\x08" + varint(size) for size in dims)
    return field(1, field(1, tag.encode()) + field(2, sizes + field(2, tensor_type.encode()) + field(3, content)))


def tensor_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def write_ckpt(path: Path, tensors: Mapping[str, torch.Tensor], *, crc: bool = False, slice_bytes: int = 1 << 29) -> Path:
    out = b""
    for tag, tensor in tensors.items():
        content = tensor_bytes(tensor)
        for start in range(0, len(content), slice_bytes):
            out += entry(tag, tensor.shape, TYPE_NAMES[ElementType.of(tensor.dtype)], content[start : start + slice_bytes])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(out + (b"crc_num" + zlib.crc32(out).to_bytes(10, "big") if crc else b""))
    return path


# ---- checkpoints


def make_plain(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """All that is no linear of a layer, and the head."""
    torch.manual_seed(5)
    tensors = {"model.tok_embeddings.embedding_weight": torch.randn(96, 64).to(dtype), "model.norm_out.weight": torch.rand(64)}
    for layer in range(2):
        tensors |= {f"model.layers.{layer}.{name}.weight": torch.rand(64) for name in ("attention_norm", "ffn_norm")}
    return tensors | {"lm_head.weight": torch.randn(96, 64).to(dtype)}


def make_float(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    linears = {f"model.layers.{n}.{name}.weight": torch.randn(shape).to(dtype) for n in range(2) for name, shape in LINEARS.items()}
    return make_plain(dtype) | linears


def make_rtn() -> dict[str, torch.Tensor]:
    tensors = make_plain(torch.float16)
    for name, (rows, columns) in ((f"model.layers.{n}.{name}", shape) for n in range(2) for name, shape in LINEARS.items()):
        tensors[f"{name}._handler.weight"] = torch.randint(-128, 128, (rows, columns), dtype=torch.int8)
        tensors[f"{name}._weight_quantizer.scale"] = torch.rand(rows).half()
        tensors[f"{name}._weight_quantizer.zp_neg"] = torch.zeros(rows).half()
    return tensors


def encode_dequant(scale: torch.Tensor) -> torch.Tensor:
    """float32 bits in the low half of int64."""
    return scale.view(torch.int32).to(torch.int64) & 0xFFFFFFFF


def make_a8w8(*, ptq: bool) -> dict[str, torch.Tensor]:
    """SmoothQuant's names (w2 stays float) or PTQ's, with the leftovers that real files carry."""
    tensors = make_plain()
    for name, (rows, columns) in ((f"model.layers.{n}.{name}", shape) for n in range(2) for name, shape in LINEARS.items()):
        if not ptq and name.endswith("w2"):
            tensors[f"{name}.weight"] = torch.randn(rows, columns)
            continue
        weight, scale = torch.randint(-128, 128, (rows, columns), dtype=torch.int8), torch.rand(rows) * 0.01
        smooth, zero = torch.rand(columns).half() + 0.5, torch.full((columns,), 7, dtype=torch.int8)
        bias = -(7 * weight.sum(1, dtype=torch.int64)).float() * scale
        if ptq:
            tensors |= {f"{name}.input_scale": smooth, f"{name}.input_zp": zero, f"{name}._layer.weight": weight}
            tensors |= {f"{name}._layer.bias": bias, f"{name}._layer.matmul.dequant_scale": encode_dequant(scale)}
            tensors |= {f"{name}._layer.matmul.input_scale": smooth, f"{name}._layer.matmul.input_zp": zero}
        else:
            tensors |= {f"{name}._input_quantizer.t_scale": smooth, f"{name}._input_quantizer.t_zp": zero}
            tensors |= {f"{name}._handler.weight": weight, f"{name}._handler.bias": bias}
            tensors[f"{name}._output_quantizer.scale"] = encode_dequant(scale)
            tensors[f"{name}._weight_observer_cell.act_observer.float_min"] = torch.zeros(columns)
            tensors[f"{name}._weight_observer_cell._input_quantizer.t_zp"] = zero
    return tensors


def add_cache(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    for layer in range(2):
        prefix = f"model.layers.{layer}.attention.infer_attention.paged_attention_mgr"
        for name in ("key", "value"):
            tensors[f"{prefix}.{name}_t_scale"] = torch.rand(32).half()
            tensors[f"{prefix}.{name}_t_zp"] = torch.zeros(32).half()
            tensors[f"{prefix}._{name}_input_quantizer.t_scale"] = torch.rand(32).half()
        tensors[f"{prefix}.key_value_t_scale"] = torch.zeros(2, 32, dtype=torch.int64)
        tensors[f"{prefix}.key_value_t_zp"] = torch.zeros(2, 32, dtype=torch.int32)
    return tensors


def fuse(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """qkv_concat True: rows under each other; what belongs to the columns is common to the parts."""
    out = dict(tensors)
    for layer in range(2):
        for fused, parts in FUSED.items():
            first = f"model.layers.{layer}.{parts[0]}."
            for rest in [name.removeprefix(first) for name in tensors if name.startswith(first)]:
                found = [out.pop(f"model.layers.{layer}.{part}.{rest}") for part in parts]
                by_column = rest.startswith(("_input_quantizer", "input_", "_layer.matmul.input_", "_weight_observer"))
                out[f"model.layers.{layer}.{fused}.{rest}"] = found[0] if by_column else torch.cat(found)
    return out


def cut(tensors: Mapping[str, torch.Tensor], ranks: int, *, vocabulary: bool = True) -> list[dict[str, torch.Tensor]]:
    """What MindFormers stores for each of `ranks`."""
    out: list[dict[str, torch.Tensor]] = [{} for _ in range(ranks)]
    for name, tensor in tensors.items():
        by_column = any(word in name for word in ("input_quantizer", "input_scale", "input_zp", "smooth_scale")) and "paged" not in name
        axis: int | None
        if ".attention.wo." in name or ".feed_forward.w2." in name:
            axis = 0 if by_column else 1 if name.endswith(".weight") else None
        elif "tok_embeddings" in name or name.startswith("lm_head"):
            axis = 0 if vocabulary else None
        else:
            axis = None if "norm" in name or by_column else tensor.dim() - 1 if "key_value_t" in name else 0
        for rank, part in enumerate([tensor] * ranks if axis is None else tensor.chunk(ranks, axis)):
            out[rank][name] = part.contiguous()
    return out


def write_ranks(folder: Path, parts: Sequence[Mapping[str, torch.Tensor]]) -> Path:
    folder.mkdir()
    for rank, tensors in enumerate(parts):
        write_ckpt(folder / f"rank_{rank}" / f"checkpoint_{rank}.ckpt", tensors, crc=rank == 1, slice_bytes=1000)
    (folder / "strategy_mp2.ckpt").write_bytes(b"of another format")
    (folder / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    (folder / "tokenizer.json").touch()
    return folder


# ---- what was read


def read_all(source: MindSporeFile, name: str) -> torch.Tensor:
    reader = FileReader()
    info = source.tensors[name]
    rows = source.read_rows(reader, name, 0, info.shape[0])
    low, high = info.shape[0] // 3, info.shape[0] - info.shape[0] // 4
    part = source.read_rows(reader, name, low, high)
    reader.close()
    assert (tuple(rows.shape), rows.dtype) == (info.shape, info.dtype.torch_dtype)
    assert torch.equal(part, rows[low:high])
    return rows


def check_complete(source: MindSporeFile) -> None:
    config = build_config(source.config)
    report = compare_tensors(plan_weights(config, read_scheme(source.config)), source.tensors, tied=config.tie_word_embeddings)
    assert report.describe() == ""


def check_same(source: MindSporeFile, expected: MindSporeFile) -> None:
    assert source.tensors == expected.tensors
    assert source.config == expected.config
    assert all(torch.equal(read_all(source, name), read_all(expected, name)) for name in expected.tensors)


# ---- row order of fused weights


def add_difference(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors with up rows a quarter longer than gate rows, and v rows shorter than q and k, as in trained models."""
    factors = {"feed_forward.w3": 1.25, "attention.wv": 0.6}
    out = dict(tensors)
    for name, tensor in tensors.items():
        factor = next((value for word, value in factors.items() if f".{word}." in name), 1.0)
        if name.endswith(("_weight_quantizer.scale", "_output_quantizer.scale", "dequant_scale")):
            scale = (0.01 + 0.001 * decode_dequant_scale(tensor).flatten().float()) * factor
            out[name] = encode_dequant(scale) if tensor.dtype == torch.int64 else scale.to(tensor.dtype)
        elif tensor.is_floating_point() and name.endswith(".weight"):
            out[name] = tensor * factor
    return out


def interleave(fused: Mapping[str, torch.Tensor], heads: int, kv_heads: int) -> dict[str, torch.Tensor]:
    """Fused tensors of order 1.3 in order 1.4: rows of each KV head together, gate and up rows in turn. `heads` are those of the slice."""
    out = dict(fused)
    for name, tensor in fused.items():
        rest = name.partition(".w_qkv.")[2] or name.partition(".w_gate_hidden.")[2]
        if not rest or rest.startswith(("_input_quantizer", "input_", "_layer.matmul.input_", "_weight_observer")):
            continue
        parts = tensor.split(split_rows(name, tensor.shape[0], heads, kv_heads))
        count = kv_heads if ".w_qkv." in name else tensor.shape[0] // 2
        out[name] = torch.cat([part.unflatten(0, (count, -1)) for part in parts], dim=1).flatten(0, 1).contiguous()
    return out


def split_rows(name: str, rows: int, heads: int, kv_heads: int) -> list[int]:
    """Rows of each part of a fused tensor."""
    if ".w_gate_hidden." in name:
        return [rows // 2, rows // 2]
    head_rows = rows // (heads + 2 * kv_heads)
    return [heads * head_rows, kv_heads * head_rows, kv_heads * head_rows]
