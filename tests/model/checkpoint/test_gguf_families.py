"""GGUF files of every family, with the names and layouts of llama.cpp's converter, give the model of the Hugging Face folder."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from model.checkpoint.formats import open_checkpoint
from model.decoder.llama import LlamaForCausalLM
from model.layers.batch import Span
from model.spec.config import build_config, read_config
from model.spec.families import list_architectures
from model.text import gguf_vocabulary
from parallel.file_slices import FileReader
from tests.model.families import MODELS, write_model

Arch = gguf.MODEL_ARCH
FILES = {
    # model: architecture of llama.cpp
    "qwen2-tied": Arch.QWEN2,
    "qwen3-plain": Arch.QWEN3,
    "phi3": Arch.PHI3,
    "mixtral": Arch.LLAMA,
    "qwen3_moe": Arch.QWEN3MOE,
}
PROMPT = [(13 * i + 5) % 79 for i in range(30)]


def permute(rows: np.ndarray, heads: int) -> np.ndarray:
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def write_gguf(path: Path, folder: Path, arch: Arch, kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32) -> Path:
    """Like convert_hf_to_gguf.py: tensors of all experts are stacked; only architecture llama interleaves heads."""
    raw, weights = read_config(folder / "config.json"), load_file(folder / "model.safetensors")
    config, name = build_config(raw), gguf.MODEL_ARCH_NAMES[arch]
    writer = gguf.GGUFWriter(path, name)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    if config.sliding_window is not None:
        writer.add_sliding_window(config.sliding_window)
    if config.experts is not None:
        writer.add_expert_count(config.experts.count)
        writer.add_expert_used_count(config.experts.per_token)
        if arch != Arch.LLAMA:
            writer.add_expert_feed_forward_length(config.experts.intermediate_size)
        stacks: dict[tuple[str, str], list[np.ndarray]] = {}
        for number in range(config.experts.count):
            for found in [found for found in weights if f".experts.{number}." in found]:
                before, after = found.split(f".experts.{number}.")
                stacks.setdefault((before, after), []).append(weights.pop(found))
        weights |= {f"{before}.experts.{after}": np.stack(rows) for (before, after), rows in stacks.items()}
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    for found, data in weights.items():
        target = names.get_name(found, try_suffixes=(".weight", ".bias"))
        assert target is not None, found
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(found.split(".")[-2], 0)
        stored = permute(data, heads) if heads and arch == Arch.LLAMA else data
        chosen = kind if data.ndim > 1 and data.shape[-1] % 32 == 0 and "gate_inp" not in target else gguf.GGMLQuantizationType.F32
        writer.add_tensor(target, gguf.quants.quantize(stored, chosen), raw_dtype=chosen)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return lambda name: write_model(tmp_path_factory.mktemp(name), name)


def test_every_family_of_llama_cpp_is_here() -> None:
    families = {family.model_type for family in list_architectures().values() if family.gguf is not None}
    assert {MODELS[name][0] for name in FILES} | {"llama"} == families


@pytest.mark.parametrize("name", FILES)
def test_a_file_decodes_like_the_folder_it_was_made_of(
    name: str, tmp_path: Path, folder: Callable[[str], Path], build_model: Callable[..., LlamaForCausalLM]
) -> None:
    path = folder(name)
    file = write_gguf(tmp_path / "m.gguf", path, FILES[name])
    notes: Any = open_checkpoint(file)
    assert notes.notes == ()
    expected, found = (model.logits_local(model([Span(model.build_cache(30), PROMPT)])) for model in map(build_model, (path, file)))
    assert torch.equal(found, expected)


def test_rows_of_quantized_experts_are_those_of_the_library(tmp_path: Path, folder: Callable[[str], Path]) -> None:
    path, kind = folder("mixtral"), gguf.GGMLQuantizationType.Q8_0
    source, reader = open_checkpoint(write_gguf(tmp_path / "m.gguf", path, Arch.LLAMA, kind)), FileReader()
    for name, data in load_file(path / "model.safetensors").items():
        if ".experts." in name and data.shape[1] % 32 == 0:
            exact = torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(data, kind), kind))
            assert torch.equal(source.read_rows(reader, name, 3, 9), exact[3:9]), name


def test_words_of_qwen_are_those_of_transformers() -> None:
    assert gguf_vocabulary._QWEN2_SPLIT == PRETOKENIZE_REGEX
