"""Every element type of GGUF against the gguf library's own dequantization, bit for bit, and models of them on several ranks."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from model.checkpoint.formats import open_checkpoint
from model.checkpoint.gguf_file import GgufFile
from model.checkpoint.gguf_header import StoredTensor
from model.checkpoint.gguf_types import ENCODINGS, describe_tensor, read_stored_rows
from model.checkpoint.source import read_pieces
from model.decoder.llama import LlamaForCausalLM
from model.export.rank_files import write_rank_files
from model.layers.batch import Span
from model.planning import Workload, plan_ranks
from model.spec.config import build_config
from model.spec.scheme import Scheme, read_scheme
from parallel.errors import CheckpointError
from parallel.file_slices import FileReader
from tests.model.gguf_blocks import HEAD_DIM, HIDDEN, make_blocks, write_blocks

QUANTIZED = [Kind(number) for number, encoding in ENCODINGS.items() if encoding.is_quantized]
PROMPT = [3, 17, 41, 5, 88]


def choose_q4_k_m(name: str) -> Kind:
    """llama.cpp's mixture Q4_K_M, roughly, with an embedding of another type."""
    if name.startswith("token_embd"):
        return Kind.Q5_1
    return Kind.Q6_K if name.startswith("output") or ("blk.0" in name and ("attn_v" in name or "ffn_down" in name)) else Kind.Q4_K


MIXTURES: dict[str, Callable[[str], Kind]] = {
    "Q4_K_M": choose_q4_k_m,
    "Q2_K": lambda name: Kind.Q2_K if "ffn" in name else Kind.Q3_K,
    "Q5_K": lambda name: Kind.Q5_K if "ffn" in name else Kind.Q5_0,
    "IQ4": lambda name: Kind.IQ4_XS if "ffn" in name else Kind.IQ4_NL,
    "IQ3": lambda name: Kind.IQ3_S if "ffn" in name else Kind.IQ3_XXS if "attn" in name else Kind.IQ2_S,
}


@pytest.mark.parametrize("number", list(ENCODINGS))
def test_block_sizes_are_those_of_the_library(number: int) -> None:
    encoding = ENCODINGS[number]
    assert encoding.name == Kind(number).name
    assert (encoding.block_elements, encoding.block_bytes) == GGML_QUANT_SIZES[Kind(number)]


@pytest.mark.parametrize("kind", QUANTIZED, ids=lambda kind: kind.name)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_rows_equal_the_librarys_dequantization(tmp_path_factory: pytest.TempPathFactory, kind: Kind, data: st.DataObject) -> None:
    rows, columns = data.draw(st.integers(1, 40)), 256 * data.draw(st.integers(1, 3))
    blocks = make_blocks(kind, rows, columns, data.draw(st.integers(0, 1 << 30)))
    start = data.draw(st.integers(0, rows - 1))
    stop = data.draw(st.integers(start, rows))
    path = tmp_path_factory.mktemp("blocks") / "raw"
    path.write_bytes(bytes(64) + blocks.tobytes())
    stored, reader = StoredTensor((rows, columns), kind.value, 64), FileReader()
    found = read_stored_rows(reader, path, stored, start, stop)
    reader.close()
    assert torch.equal(found, torch.from_numpy(dequantize(blocks, kind))[start:stop])
    info = describe_tensor(stored)
    assert (info.shape, info.dtype_name, info.encoding) == ((rows, columns), "float32", kind.name)
    assert reader.read_bytes == (stop - start) * blocks.shape[1] == (stop - start) * (info.row_bytes or 0)


def test_large_tensors_are_dequantized_in_pieces(tmp_path: Path) -> None:
    blocks = make_blocks(Kind.Q4_K, 3000, 1024, 1)
    (tmp_path / "raw").write_bytes(blocks.tobytes())
    found = read_stored_rows(FileReader(), tmp_path / "raw", StoredTensor((3000, 1024), Kind.Q4_K.value, 0), 1, 2999)
    assert torch.equal(found, torch.from_numpy(dequantize(blocks, Kind.Q4_K))[1:2999])


@pytest.mark.parametrize("kind", [Kind.MXFP4, Kind.TQ1_0, Kind.Q8_K], ids=lambda kind: kind.name)
def test_a_type_that_cannot_be_read_is_named_with_those_that_can(tmp_path: Path, kind: Kind) -> None:
    path = write_blocks(tmp_path / "m.gguf", lambda name: Kind.Q4_K)
    content = path.read_bytes()
    place = content.index(b"token_embd.weight") + len("token_embd.weight") + 4 + 16
    path.write_bytes(content[:place] + np.uint32(kind.value).tobytes() + content[place + 4 :])
    with pytest.raises(CheckpointError, match=rf"token_embd\.weight has type {kind.name}, but only F32, F16, BF16, Q8_0, .*Q4_K"):
        GgufFile(path)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """The GGUF file of a mixture, and a Hugging Face folder of the same weights, dequantized by the library."""
    made: dict[str, tuple[Path, Path]] = {}

    def build(name: str) -> tuple[Path, Path]:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            path = write_blocks(folder / "m.gguf", MIXTURES[name])
            made[name] = path, write_dequantized(path, folder / "hf")
        return made[name]

    return build


def write_dequantized(path: Path, folder: Path) -> Path:
    from gguf import GGUFReader

    source, names = GgufFile(path), {}
    for tensor in GGUFReader(path).tensors:
        rows = torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type)))
        if "attn_q" in tensor.name or "attn_k" in tensor.name:
            rows = rows.view(-1, HEAD_DIM // 2, 2, HIDDEN).transpose(1, 2).reshape(rows.shape)
        names[tensor.name] = rows.contiguous()
    own = {"blk": "model.layers", "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    inner = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj"}
    inner |= {f"ffn_{name}": f"mlp.{name}_proj" for name in ("gate", "up", "down")}
    inner |= {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
    folder.mkdir()
    renamed = {".".join({**own, **inner}.get(part, part) for part in name.split(".")): rows for name, rows in names.items()}
    save_file(renamed, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(source.config))
    return folder


def decode(model: LlamaForCausalLM) -> list[torch.Tensor]:
    """Hidden states of the prompt and of a token after it."""
    cache = model.build_cache(16)
    return [model.forward([Span(cache, PROMPT)]), model.forward([Span(cache, [9])])]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", MIXTURES)
def test_a_model_equals_its_dequantized_form_on_any_number_of_ranks(
    one_thread: None, mixture: Callable[[str], tuple[Path, Path]], run_ranks: Callable[..., list[Any]], name: str, dtype: str
) -> None:
    path, folder = mixture(name)
    (expected,) = run_ranks(folder, 1, decode, dtype=dtype)
    for world_size in (1, 2, 3):
        for found in run_ranks(path, world_size, decode, dtype=dtype):
            assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True)), world_size


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_rank_reads_the_planned_bytes(
    mixture: Callable[[str], tuple[Path, Path]], build_model: Callable[..., Any], gather_ranks: Any, world_size: int, dtype: str
) -> None:
    path, _ = mixture("Q4_K_M")
    source = open_checkpoint(path)
    stored = {name: info.form for name, info in source.tensors.items()}
    plans = plan_ranks(build_config(source.config), Scheme(), world_size, Workload(dtype=dtype, tokens=8), stored)
    from model.decoder.loading import ModelLoader, load_model

    def load(collectives: Any) -> tuple[int, int]:
        config = build_config(source.config)
        model = LlamaForCausalLM(config, read_scheme(source.config), collectives, dtype=dtype, device=torch.device("cpu"))
        assert ModelLoader(model, source).total_bytes > 0
        return load_model(model, source), model.weight_bytes

    for plan, (read_bytes, weight_bytes) in zip(plans, gather_ranks(world_size, load), strict=True):
        assert (read_bytes, weight_bytes) == (plan.file_bytes, plan.weight_bytes)
    if world_size == 1:
        assert plans[0].file_bytes == sum(
            info.num_bytes if not info.row_bytes else info.shape[0] * info.row_bytes for info in source.tensors.values()
        )


def test_pieces_of_reordered_rows_are_read_once(mixture: Callable[[str], tuple[Path, Path]], monkeypatch: pytest.MonkeyPatch) -> None:
    path, _ = mixture("Q4_K_M")
    source, reader, name = open_checkpoint(path), FileReader(), "model.layers.0.self_attn.q_proj.weight"
    info = source.tensors[name]
    monkeypatch.setattr("model.checkpoint.source.PIECE_BYTES", info.num_bytes // info.shape[0] * (HEAD_DIM + 5))
    pieces = list(read_pieces(source, reader, name, 0, info.shape[0]))
    assert {len(piece) for piece in pieces} == {HEAD_DIM}
    assert reader.read_bytes == info.shape[0] * (info.row_bytes or 0)
    assert torch.equal(torch.cat(pieces), source.read_rows(reader, name, 0, info.shape[0]))


def test_rank_files_of_a_quantized_file_hold_the_same_weights(
    tmp_path: Path, mixture: Callable[[str], tuple[Path, Path]], one_thread: None, run_ranks: Callable[..., list[Any]]
) -> None:
    path, folder = mixture("Q5_K")
    source = open_checkpoint(path)
    write_rank_files(source, build_config(source.config), Scheme(), 3, tmp_path / "ranks")
    (expected,) = run_ranks(folder, 1, decode)
    for found in run_ranks(tmp_path / "ranks", 2, decode):
        assert torch.equal(found[0], expected[0])
