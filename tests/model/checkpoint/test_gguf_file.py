"""GGUF files written by gguf's own writer, read back row by row and compared with gguf's own dequantization."""

import math
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize, quantize

from model.checkpoint.gguf_file import GgufFile
from model.checkpoint.gguf_header import read_gguf_header
from model.spec.config import build_config
from model.spec.rope_scaling import LinearScaling, RopeScaling, YarnScaling, scale_frequency
from parallel.errors import CheckpointError, ConfigError
from parallel.file_slices import FileReader

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, HEAD_DIM, VOCAB, LAYERS = 96, 64, 3, 1, 32, 40, 2
QUERY, KEY = "model.layers.1.self_attn.q_proj.weight", "model.layers.1.self_attn.k_proj.weight"
DTYPES = {Kind.F16: torch.float16, Kind.BF16: torch.bfloat16}
BLOCK_BYTES = {Kind.Q8_0: 34 / 32, Kind.Q4_0: 18 / 32, Kind.Q4_1: 20 / 32, Kind.Q5_1: 24 / 32, Kind.F32: 4, Kind.F16: 2, Kind.BF16: 2}
METADATA: dict[str, Any] = {
    "llama.context_length": 128,
    "llama.embedding_length": HIDDEN,
    "llama.block_count": LAYERS,
    "llama.feed_forward_length": INTERMEDIATE,
    "llama.attention.head_count": HEADS,
    "llama.attention.head_count_kv": KV_HEADS,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 50000.0,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
}


def make_weights(tied: bool = False) -> dict[str, np.ndarray]:
    """Random weights in Hugging Face's names and order, with the names that llama.cpp gives them."""
    shapes = {"model.embed_tokens.weight": (VOCAB, HIDDEN), "model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCAB, HIDDEN)}
    for layer in range(LAYERS):
        shapes |= {
            f"model.layers.{layer}.{name}.weight": shape
            for name, shape in {
                "input_layernorm": (HIDDEN,),
                "self_attn.q_proj": (HEADS * HEAD_DIM, HIDDEN),
                "self_attn.k_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
                "self_attn.v_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
                "self_attn.o_proj": (HIDDEN, HEADS * HEAD_DIM),
                "post_attention_layernorm": (HIDDEN,),
                "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
                "mlp.up_proj": (INTERMEDIATE, HIDDEN),
                "mlp.down_proj": (HIDDEN, INTERMEDIATE),
            }.items()
        }
    if tied:
        del shapes["lm_head.weight"]
    random = np.random.default_rng(7)
    return {name: random.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}


def permute(rows: np.ndarray, heads: int) -> np.ndarray:
    """The reordering of llama.cpp's convert_hf_to_gguf.py."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def write_gguf(path: Path, weights: dict[str, np.ndarray], kind: Kind = Kind.F32, architecture: str = "llama", **changes: Any) -> Path:
    """Matrices as `kind`, vectors as F32; a change of None leaves a metadata key out ("__" stands for ".")."""
    writer = gguf.GGUFWriter(path, architecture)
    metadata = METADATA | {key.replace("__", "."): value for key, value in changes.items()}
    if alignment := metadata.pop("general.alignment", None):
        writer.add_custom_alignment(alignment)
    add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, list: writer.add_array}
    for key, value in metadata.items():
        if value is not None:
            add[type(value)](key, value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, LAYERS)
    for name, data in weights.items():
        heads = HEADS if "q_proj" in name else KV_HEADS if "k_proj" in name else 0
        stored = permute(data, heads) if heads else data
        chosen = kind if data.ndim == 2 else Kind.F32
        target = names.get_name(name, try_suffixes=(".weight",)) or name
        writer.add_tensor(target, quantize(stored, chosen), raw_dtype=chosen)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def expect(data: np.ndarray, kind: Kind) -> torch.Tensor:
    """What reading must give: rows are quantized one by one, so that their order does not matter."""
    if data.ndim == 1:
        return torch.from_numpy(data)
    exact = torch.from_numpy(dequantize(quantize(data, kind), kind).astype(np.float32))
    return exact.to(DTYPES.get(kind, torch.float32))


@pytest.mark.parametrize("kind", list(BLOCK_BYTES), ids=lambda kind: kind.name)
def test_every_tensor_of_every_type_equals_ggufs_own_dequantization(tmp_path: Path, kind: Kind) -> None:
    weights = make_weights()
    source, reader = GgufFile(write_gguf(tmp_path / "m.gguf", weights, kind)), FileReader()
    assert set(source.tensors) == set(weights)
    for name, data in weights.items():
        rows = source.read_rows(reader, name, 0, data.shape[0])
        assert (tuple(rows.shape), rows.dtype) == (source.tensors[name].shape, source.tensors[name].dtype.torch_dtype)
        assert torch.equal(rows, expect(data, kind)), name


@pytest.mark.parametrize("name", [QUERY, KEY])
@pytest.mark.parametrize("kind", [Kind.F16, Kind.Q4_1], ids=lambda kind: kind.name)
def test_a_row_range_that_cuts_a_head_equals_the_rows_of_the_whole(tmp_path: Path, kind: Kind, name: str) -> None:
    weights = make_weights()
    source, reader = GgufFile(write_gguf(tmp_path / "m.gguf", weights, kind)), FileReader()
    whole, rows = expect(weights[name], kind), weights[name].shape[0]
    for start, stop in [(0, 1), (5, 6), (3, rows - 2), (rows - 1, rows), (7, 7), (0, rows), (HEAD_DIM % rows, rows)]:
        assert torch.equal(source.read_rows(reader, name, start, stop), whole[start:stop]), (start, stop)


@pytest.mark.parametrize("kind", list(BLOCK_BYTES), ids=lambda kind: kind.name)
def test_a_rank_reads_the_bytes_of_its_rows_and_no_others(tmp_path: Path, kind: Kind) -> None:
    source, reader = GgufFile(write_gguf(tmp_path / "m.gguf", make_weights(), kind)), FileReader()
    source.read_rows(reader, "model.layers.0.mlp.up_proj.weight", 16, 48)
    assert reader.read_bytes == 32 * HIDDEN * BLOCK_BYTES[kind]
    source.read_rows(reader, QUERY, HEAD_DIM, 2 * HEAD_DIM)
    assert reader.read_bytes == (32 + HEAD_DIM) * HIDDEN * BLOCK_BYTES[kind]


def test_the_metadata_become_a_hugging_face_config(tmp_path: Path) -> None:
    source = GgufFile(write_gguf(tmp_path / "m.gguf", make_weights()))
    config = build_config(source.config)
    assert (config.hidden_size, config.intermediate_size, config.num_hidden_layers) == (HIDDEN, INTERMEDIATE, LAYERS)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (HEADS, KV_HEADS, HEAD_DIM)
    assert (config.vocab_size, config.max_position_embeddings) == (VOCAB, 128)
    assert (config.rms_norm_eps, config.rope_theta, config.rope_scaling) == (1e-5, 50000.0, None)
    assert (config.bos_token_id, config.eos_token_ids, config.pad_token_id) == (1, (2,), None)
    assert not config.tie_word_embeddings
    assert source.tokenizer_path() is None


def test_a_file_without_output_weight_ties_the_head_to_the_embedding(tmp_path: Path) -> None:
    source = GgufFile(write_gguf(tmp_path / "m.gguf", make_weights(tied=True), Kind.BF16))
    assert source.config["tie_word_embeddings"] is True
    assert build_config(source.config).dtype == "bfloat16"


def test_a_file_with_a_vocabulary_is_its_own_tokenizer(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", make_weights(), tokenizer__ggml__tokens=[f"t{i}" for i in range(VOCAB)])
    assert GgufFile(path).tokenizer_path() == path


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_stored_rope_factors_give_the_llama3_scaling_back(tmp_path: Path, factor: float) -> None:
    scaling = RopeScaling(factor=factor, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)
    plain = [50000.0 ** (-2 * i / HEAD_DIM) for i in range(HEAD_DIM // 2)]
    divisors = np.array([f / scale_frequency(f, scaling) for f in plain], dtype=np.float32)
    source = GgufFile(write_gguf(tmp_path / "m.gguf", make_weights() | {"rope_freqs.weight": divisors}))
    assert build_config(source.config).rope_scaling == scaling
    assert "rope_freqs.weight" not in source.tensors


def test_stored_rope_factors_of_another_scaling_are_refused(tmp_path: Path) -> None:
    divisors = np.linspace(1, 5, HEAD_DIM // 2, dtype=np.float32)
    with pytest.raises(CheckpointError, match="rope_freqs"):
        GgufFile(write_gguf(tmp_path / "m.gguf", make_weights() | {"rope_freqs.weight": divisors}))


def test_another_rope_scaling_is_passed_on_for_the_config_to_refuse(tmp_path: Path) -> None:
    source = GgufFile(write_gguf(tmp_path / "m.gguf", make_weights(), llama__rope__scaling__type="longrope"))
    with pytest.raises(ConfigError, match="longrope"):
        build_config(source.config)


def test_a_file_cut_within_its_tensors_is_refused_with_both_sizes(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", make_weights())
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=rf"has {size - 1000} bytes, but .* reaches byte \d+"):
        GgufFile(path)


@pytest.mark.parametrize("size", [0, 3, 20, 300])
def test_a_file_cut_within_its_header_is_refused(tmp_path: Path, size: int) -> None:
    path = write_gguf(tmp_path / "m.gguf", make_weights())
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=f"{size} bytes"):
        GgufFile(path)


@pytest.mark.parametrize(
    ("start", "message"),
    [(b"PK\x03\x04", "is not a GGUF file"), (b"GGUF" + struct.pack("<I", 1), "version 1"), (b"GGUF" + struct.pack(">I", 3), "version")],
)
def test_a_file_of_another_format_or_version_is_refused(tmp_path: Path, start: bytes, message: str) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(start + bytes(100))
    with pytest.raises(CheckpointError, match=message):
        GgufFile(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "bloom"}, "architecture 'bloom', but only 'llama', .*'qwen2', "),
        ({"llama__context_length": None}, r"lacks the metadata key llama\.context_length"),
        ({"llama__expert_count": 8}, r"lacks the metadata key llama\.expert_used_count"),
        ({"split__count": 3}, r"one of 3 parts, .* NAME-00001-of-00003\.gguf"),
        ({"llama__attention__head_count_kv": [1, 1]}, r"head_count_kv is \[1, 1\], but one whole number .*, for all layers, is needed"),
        ({"llama__attention__head_count": 7}, "does not divide into 7 heads"),
    ],
)
def test_a_model_that_cannot_be_run_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        GgufFile(write_gguf(tmp_path / "m.gguf", make_weights(), **changes))


def test_the_header_equals_what_ggufs_own_reader_sees(tmp_path: Path) -> None:
    extra = {"a__strings": ["x", "ü", ""], "a__numbers": [1, -2, 3], "a__floats": [0.5, 2.0], "general__alignment": 64}
    path = write_gguf(tmp_path / "m.gguf", make_weights(), Kind.Q8_0, **extra)
    header, reference = read_gguf_header(path), gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reference.fields.items() if not name.startswith("GGUF.")}
    assert header.metadata == fields
    for tensor in reference.tensors:
        stored = header.tensors[tensor.name]
        assert (stored.shape, stored.offset_bytes) == (tuple(int(n) for n in reversed(tensor.shape)), tensor.data_offset)
        assert stored.type_number == tensor.tensor_type
    assert len(header.tensors) == len(reference.tensors)
    assert math.prod(header.tensors["token_embd.weight"].shape) == VOCAB * HIDDEN


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, None),
        ({"llama.rope.scale_linear": 2.0}, LinearScaling(factor=2.0)),
        ({"llama.rope.scaling.factor": 2.0}, LinearScaling(factor=2.0)),
        ({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}, LinearScaling(factor=4.0)),
        (
            {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0, "llama.rope.scale_linear": 4.0},
            LinearScaling(factor=4.0),
        ),
        ({"llama.rope.scaling.type": "linear"}, None),
        ({"llama.rope.scaling.type": "none"}, None),
        ({"llama.rope.scale_linear": 1.0}, None),
        (
            {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0, "llama.rope.scaling.original_context_length": 32},
            YarnScaling(factor=4.0, original_max_position_embeddings=32, attention_factor=0.1 * math.log(4) + 1),
        ),
    ],
)
def test_rope_keys_are_read_as_llama_cpp_reads_them(tmp_path: Path, changes: dict[str, Any], expected: object) -> None:
    source = GgufFile(write_gguf(tmp_path / "m.gguf", make_weights(), **changes))
    assert build_config(source.config).rope_scaling == expected
    assert source.notes == ()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"llama.rope.scale_linear": 2.0, "llama.rope.scaling.factor": 4.0},
            r"scale_linear is 2\.0, but llama\.rope\.scaling\.factor is 4\.0",
        ),
        ({"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0}, r"type is 'none', but the factor is 4\.0"),
        ({"llama.rope.scaling.attn_factor": 2.0}, r"attn_factor is 2\.0, but only 1 is supported"),
        ({"llama.logit_scale": 4.0}, r"llama\.logit_scale is 4\.0, but only 0 or 1 is supported"),
        ({"llama.residual_scale": 0.5}, r"llama\.residual_scale is 0\.5"),
        ({"llama.embedding_scale": 12.0}, r"llama\.embedding_scale is 12\.0"),
        ({"llama.attention.scale": 0.5}, r"llama\.attention\.scale is 0\.5"),
        ({"llama.attention.sliding_window": 64}, r"llama\.attention\.sliding_window is 64, but only 0 is supported"),
        ({"llama.expert_used_count": 2}, r"llama\.expert_used_count is 2"),
        ({"llama.tensor_data_layout": "other"}, r"tensor_data_layout is 'other', but only 'Meta AI original pth' is supported"),
        ({"llama.attention.value_length": 16}, r"value_length is 16, but heads have the width 32"),
        ({"llama.rope.dimension_count": 16}, r"dimension_count is 16, but heads have the width 32"),
        ({"llama.vocab_size": 41}, r"vocab_size is 41, but the rows of token_embd\.weight are 40"),
        ({"general.type": "adapter"}, r"general\.type is 'adapter', but only 'model' is supported"),
        ({"split.count": 3, "general.architecture": None}, "is one of 3 parts, which are found by their names"),
    ],
)
def test_a_key_that_changes_the_arithmetic_is_read_or_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    path = write_gguf(tmp_path / "m.gguf", make_weights(), **changes)
    with pytest.raises(CheckpointError, match=rf"m\.gguf.*{words}"):
        build_config(GgufFile(path).config, str(path))


def test_unknown_keys_are_told_and_biases_are_refused_by_name(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", make_weights(), **{"llama.new_thing": 3, "acme.note": "x", "general.name": "n"})
    assert [note.rsplit(": ", 1)[1] for note in GgufFile(path).notes] == ["llama.new_thing, acme.note"]
    bias = {"model.layers.0.self_attn.q_proj.bias": np.zeros(HEADS * HEAD_DIM, dtype=np.float32)}
    with pytest.raises(CheckpointError, match=r"q.*\.bias, but biases are not supported in GGUF files of llama models"):
        GgufFile(write_gguf(tmp_path / "b.gguf", make_weights() | bias))
