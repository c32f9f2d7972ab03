"""GGUF files of types that the gguf library dequantizes but does not write: random valid blocks."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Kind

SCALES: Mapping[Kind, Mapping[int, float]] = {
    Kind.Q2_K: {80: 0.008, 82: 0.012},
    Kind.Q3_K: {108: 0.003},
    Kind.Q4_K: {0: 0.0006, 2: 0.0045},
    Kind.Q5_K: {0: 0.0003, 2: 0.0046},
    Kind.Q6_K: {208: 0.0001},
    Kind.IQ4_NL: {0: 0.002},
    Kind.IQ4_XS: {0: 0.0001},
    Kind.IQ2_XXS: {0: 0.003},
    Kind.IQ2_XS: {0: 0.003},
    Kind.IQ2_S: {0: 0.003},
    Kind.IQ3_XXS: {0: 0.0015},
    Kind.IQ3_S: {0: 0.0008},
}
"""Offset and typical value of the float16 scales in a block, by ggml's block structures; all other bytes may have any value."""
METADATA: Mapping[str, Any] = {
    "llama.context_length": 128,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 10000.0,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
}
HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, HEAD_DIM, VOCAB, LAYERS = 256, 512, 8, 4, 32, 96, 2
_LAYER = {
    "attn_q": (HEADS * HEAD_DIM, HIDDEN),
    "attn_k": (KV_HEADS * HEAD_DIM, HIDDEN),
    "attn_v": (KV_HEADS * HEAD_DIM, HIDDEN),
    "attn_output": (HIDDEN, HEADS * HEAD_DIM),
    "ffn_gate": (INTERMEDIATE, HIDDEN),
    "ffn_up": (INTERMEDIATE, HIDDEN),
    "ffn_down": (HIDDEN, INTERMEDIATE),
}


def make_blocks(kind: Kind, rows: int, columns: int, seed: int) -> np.ndarray:
    """uint8 [rows, bytes of a row], dequantized to values with a standard deviation of about 0.15."""
    random = np.random.default_rng(seed)
    if kind not in SCALES:
        return gguf.quants.quantize(random.normal(0, 0.15, (rows, columns)).astype(np.float32), kind)
    elements, size = GGML_QUANT_SIZES[kind]
    blocks = random.integers(0, 256, (rows * columns // elements, size), dtype=np.uint8)
    for offset, typical in SCALES[kind].items():
        scales = (random.uniform(0.5, 1.5, len(blocks)) * typical).astype(np.float16)
        blocks[:, offset : offset + 2] = scales.view(np.uint8).reshape(-1, 2)
    return blocks.reshape(rows, columns // elements * size)


def list_tensors() -> dict[str, tuple[int, ...]]:
    """Shapes by llama.cpp's names."""
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (VOCAB, HIDDEN)}
    for layer in range(LAYERS):
        shapes |= {f"blk.{layer}.{name}.weight": shape for name, shape in _LAYER.items()}
        shapes |= {f"blk.{layer}.{name}.weight": (HIDDEN,) for name in ("attn_norm", "ffn_norm")}
    return {**shapes, "output_norm.weight": (HIDDEN,), "output.weight": (VOCAB, HIDDEN)}


def write_blocks(path: Path, choose: Callable[[str], Kind], *, part_tensors: int = 0, vocabulary: bool = False) -> Path:
    """Write a whole random Llama of these types; returns its path, that of the first part if it is split.

    `vocabulary`: with tokens for the printable characters of ASCII but the last two.
    """
    sizes = {"embedding_length": HIDDEN, "block_count": LAYERS, "feed_forward_length": INTERMEDIATE}
    sizes |= {"attention.head_count": HEADS, "attention.head_count_kv": KV_HEADS}
    split: dict[str, Any] = {"split_max_tensors": part_tensors} if part_tensors else {}
    writer = gguf.GGUFWriter(path, "llama", **split)
    for key, value in {**METADATA, **{f"llama.{key}": value for key, value in sizes.items()}}.items():
        (writer.add_uint32 if isinstance(value, int) else writer.add_float32)(key, value)
    if vocabulary:
        tokens = ["<unk>", "<s>", "</s>", "\u2581", *(chr(code) for code in range(33, 33 + VOCAB - 4))]
        writer.add_tokenizer_model("llama")
        writer.add_token_list(tokens)
        writer.add_token_scores([0.0] * VOCAB)
        writer.add_token_types([2, 3, 3, *[1] * (VOCAB - 3)])
    for seed, (name, shape) in enumerate(list_tensors().items()):
        if len(shape) == 1:
            writer.add_tensor(name, np.random.default_rng(seed).uniform(0.5, 1.5, shape).astype(np.float32))
        else:
            writer.add_tensor(name, make_blocks(choose(name), *shape, seed), raw_dtype=choose(name))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path if not part_tensors else min(path.parent.glob(f"{path.stem}-*.gguf"))
