"""Writes a GGUF file of random Q8_0 weights in the shape of a Hugging Face config.json, for llama.cpp's llama-bench.

    python scripts/bench/random_gguf.py scripts/bench/shapes/tinyllama_1.1b.json tinyllama.gguf [--layers 4]

Matrices are Q8_0 as llama-quantize makes them, embedding and head included; norms are float32. There is no vocabulary ("no_vocab"):
llama-bench runs on random ids and needs none, other programs of llama.cpp refuse the file. Tensor by tensor, so memory stays small.

llama-bench, from the sources that llama-cpp-python carries (0.3.36 has been used; some minutes on two cores):

    pip download --no-deps --no-binary llama-cpp-python llama-cpp-python==0.3.36 && tar xf llama_cpp_python-0.3.36.tar.gz
    cd llama_cpp_python-0.3.36/vendor/llama.cpp
    cmake -B build -G Ninja -DCMAKE_BUILD_TYPE=Release -DLLAMA_BUILD_{TESTS,SERVER,MTMD,UI}=OFF
    cmake --build build --target llama-bench    # build/bin/llama-bench
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter

from model.spec.config import LlamaConfig, build_config, read_config

_BLOCK, _BLOCK_BYTES = 32, 34
"""Weights in a block of Q8_0, and its bytes: a float16 scale and the int8 weights."""
_SCALE = np.float16(2e-4)
"""Of every block: products of hidden states stay near one."""


def list_tensors(config: LlamaConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor, in llama.cpp's names."""
    hidden, inner = config.hidden_size, config.intermediate_size
    query, key_value = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    yield "token_embd.weight", (config.vocab_size, hidden)
    for layer in range(config.num_hidden_layers):
        yield f"blk.{layer}.attn_norm.weight", (hidden,)
        yield f"blk.{layer}.attn_q.weight", (query, hidden)
        yield f"blk.{layer}.attn_k.weight", (key_value, hidden)
        yield f"blk.{layer}.attn_v.weight", (key_value, hidden)
        yield f"blk.{layer}.attn_output.weight", (hidden, query)
        yield f"blk.{layer}.ffn_norm.weight", (hidden,)
        yield f"blk.{layer}.ffn_gate.weight", (inner, hidden)
        yield f"blk.{layer}.ffn_up.weight", (inner, hidden)
        yield f"blk.{layer}.ffn_down.weight", (hidden, inner)
    yield "output_norm.weight", (hidden,)
    if not config.tie_word_embeddings:
        yield "output.weight", (config.vocab_size, hidden)


def write_random_gguf(path: Path, config: LlamaConfig, name: str, seed: int = 0, *, vocabulary: bool = False) -> None:
    """Write the file. `vocabulary`: with made-up tokens."""
    writer, generator = GGUFWriter(path, "llama"), np.random.default_rng(seed)
    writer.add_name(name)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(7)  # mostly Q8_0
    if vocabulary:
        _add_vocabulary(writer, config)
    else:
        writer.add_tokenizer_model("no_vocab")
    tensors = list(list_tensors(config))
    for tensor, shape in tensors:
        if len(shape) == 1:
            writer.add_tensor_info(tensor, shape, np.dtype(np.float32), 4 * shape[0])
        else:
            stored = (shape[0], _stored_columns(shape[1]))
            writer.add_tensor_info(tensor, stored, np.dtype(np.uint8), stored[0] * stored[1], GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, shape in tensors:
        writer.write_tensor_data(np.ones(shape, np.float32) if len(shape) == 1 else _random_blocks(shape, generator))
    writer.close()


def _add_vocabulary(writer: GGUFWriter, config: LlamaConfig) -> None:
    """Single bytes, then words that no text has: no merges lead to them."""
    tokens = [chr(0x100 + token) if token < 256 else f"token{token}" for token in range(config.vocab_size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token < 3 else 1 for token in range(config.vocab_size)])
    writer.add_token_merges(["\u0100 \u0101"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def _stored_columns(columns: int) -> int:
    if columns % _BLOCK:
        raise SystemExit(f"a matrix has {columns} columns, but Q8_0 needs a multiple of {_BLOCK}")
    return columns // _BLOCK * _BLOCK_BYTES


def _random_blocks(shape: tuple[int, ...], generator: np.random.Generator) -> np.ndarray:
    rows, stored = shape[0], _stored_columns(shape[1])
    blocks = np.frombuffer(generator.bytes(rows * stored), np.uint8).reshape(-1, _BLOCK_BYTES).copy()
    blocks[:, :2] = np.frombuffer(_SCALE.tobytes(), np.uint8)
    return blocks.reshape(rows, stored)


def main() -> None:
    """Write what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_config", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--vocabulary", action="store_true", help="with made-up tokens, which OpenVINO GenAI needs")
    options = parser.parse_args()
    raw = read_config(options.model_config)
    raw["num_hidden_layers"] = options.layers or raw["num_hidden_layers"]
    config = build_config(raw, str(options.model_config))
    write_random_gguf(options.output, config, options.model_config.stem, vocabulary=options.vocabulary)
    print(f"wrote {options.output}, {options.output.stat().st_size / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
