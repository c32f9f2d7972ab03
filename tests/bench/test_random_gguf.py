"""A random GGUF file: its tensors are those of the model, and this project's own reader takes it."""

import json
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader

from model.spec.config import build_config
from random_gguf import write_random_gguf

RAW = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 48,
    "max_position_embeddings": 128,
}


@pytest.mark.parametrize("tied", [False, True])
def test_tensors_have_the_shapes_of_the_model_as_q8_0(tmp_path: Path, tied: bool) -> None:
    path = tmp_path / "m.gguf"
    write_random_gguf(path, build_config({**RAW, "tie_word_embeddings": tied}), "m")
    reader = GGUFReader(path)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert len(tensors) == 2 * 9 + 2 + (not tied)
    assert ("output.weight" in tensors) != tied
    key = tensors["blk.1.attn_k.weight"]
    assert (list(key.shape), key.tensor_type.name, key.n_bytes) == ([64, 32], "Q8_0", 64 * 32 // 32 * 34)
    assert tensors["blk.0.ffn_norm.weight"].tensor_type.name == "F32"
    scales = np.asarray(key.data).reshape(-1, 34)[:, :2].copy().view(np.float16)
    assert np.unique(scales).tolist() == [np.float16(2e-4)]
    assert int(reader.fields["llama.attention.head_count_kv"].parts[-1][0]) == 2


def test_columns_that_are_no_whole_blocks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="100 columns"):
        write_random_gguf(tmp_path / "m.gguf", build_config({**RAW, "intermediate_size": 100}), "m")


def test_shapes_are_whole_configs() -> None:
    shapes = sorted((Path(__file__).resolve().parents[2] / "scripts" / "bench" / "shapes").glob("*.json"))
    assert [path.stem for path in shapes] == ["llama2_70b", "llama2_7b", "smollm2_0.1b", "tinyllama_1.1b"]
    for path in shapes:
        assert build_config(json.loads(path.read_text())).num_hidden_layers >= 22
