"""Meta's folders, cut here as Meta cuts them and saved by torch.save, read back bit by bit; damaged and hostile ones refused."""

import hashlib
import io
import json
import os
import pickle
import re
import struct
import zipfile
import zlib
from collections.abc import Callable
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from model.checkpoint.meta_folder import MetaFolder, is_meta
from model.checkpoint.meta_params import read_meta_params
from model.checkpoint.source import Checksum
from model.checkpoint.torch_header import StoredTensor, read_torch_header
from model.checkpoint.verification import require_intact
from model.decoder.llama import LlamaForCausalLM
from model.layers.batch import Span
from model.spec.config import build_config
from model.spec.tensor_info import TensorInfo
from parallel.element_type import ElementType
from parallel.errors import CheckpointError, ConfigError
from parallel.file_slices import FileReader

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, HEAD_DIM, VOCAB, LAYERS = 64, 96, 8, 4, 8, 120, 2
PARAMS: dict[str, Any] = {
    "dim": HIDDEN,
    "n_layers": LAYERS,
    "n_heads": HEADS,
    "n_kv_heads": KV_HEADS,
    "norm_eps": 1e-05,
    "vocab_size": -1,
    "multiple_of": 32,
}
TOP = {"model.embed_tokens": "tok_embeddings", "model.norm": "norm", "lm_head": "output"}
LINEARS = {
    "self_attn.q_proj": ("attention.wq", 0, (HIDDEN, HIDDEN)),
    "self_attn.k_proj": ("attention.wk", 0, (KV_HEADS * HEAD_DIM, HIDDEN)),
    "self_attn.v_proj": ("attention.wv", 0, (KV_HEADS * HEAD_DIM, HIDDEN)),
    "self_attn.o_proj": ("attention.wo", 1, (HIDDEN, HIDDEN)),
    "mlp.gate_proj": ("feed_forward.w1", 0, (INTERMEDIATE, HIDDEN)),
    "mlp.down_proj": ("feed_forward.w2", 1, (HIDDEN, INTERMEDIATE)),
    "mlp.up_proj": ("feed_forward.w3", 0, (INTERMEDIATE, HIDDEN)),
}
NORMS = {"input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm"}
QUERY, KEY, DOWN = (f"model.layers.1.{name}.weight" for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj"))
CUTS = [(1, 0), (2, 0), (2, 1), (4, 0), (4, 1)]
"""Files, and the dimension of the embedding that they cut: Llama 3 rows, the older ones columns."""


def make_weights(dtype: torch.dtype = torch.bfloat16, tied: bool = False) -> dict[str, torch.Tensor]:
    """Random weights in Hugging Face's names and order."""
    generator = torch.Generator().manual_seed(5)

    def draw(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * 0.1).to(dtype)

    weights = {"model.embed_tokens.weight": draw(VOCAB, HIDDEN), "model.norm.weight": 1 + draw(HIDDEN)}
    if not tied:
        weights["lm_head.weight"] = draw(VOCAB, HIDDEN)
    for layer in range(LAYERS):
        weights |= {f"model.layers.{layer}.{name}.weight": draw(*shape) for name, (_, _, shape) in LINEARS.items()}
        weights |= {f"model.layers.{layer}.{name}.weight": 1 + draw(HIDDEN) for name in NORMS}
    return weights


def interleave(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Rotary pairs beside each other: what transformers' conversion of Meta's weights undoes."""
    return rows.view(heads, 2, -1, rows.shape[1]).transpose(1, 2).reshape(rows.shape)


def cut_weights(weights: dict[str, torch.Tensor], files: int, embedding_axis: int) -> list[dict[str, torch.Tensor]]:
    """What each of Meta's ranks holds."""
    ranks: list[dict[str, torch.Tensor]] = [{} for _ in range(files)]
    for name, whole in weights.items():
        middle = name.removesuffix(".weight")
        prefix, axis = "", {"model.embed_tokens": embedding_axis, "lm_head": 0}.get(middle)
        if middle in TOP:
            target = TOP[middle]
        else:
            _, _, number, rest = middle.split(".", 3)
            prefix = f"layers.{number}."
            target, axis, _ = LINEARS[rest] if rest in LINEARS else (NORMS[rest], None, ())
        heads = {"attention.wq": HEADS, "attention.wk": KV_HEADS}.get(target)
        stored = interleave(whole, heads) if heads else whole
        parts = [stored] * files if axis is None else stored.chunk(files, axis)
        for rank, part in zip(ranks, parts, strict=True):
            rank[f"{prefix}{target}.weight"] = part.clone()
    for rank in ranks:
        rank["rope.freqs"] = torch.ones(HEAD_DIM // 2, dtype=torch.complex64)
    return ranks


def write_meta(
    folder: Path, weights: dict[str, torch.Tensor] | None = None, files: int = 1, embedding_axis: int = 0, **changes: Any
) -> Path:
    """A folder as Meta's; a change of None leaves a key of params.json out."""
    folder.mkdir(parents=True, exist_ok=True)
    for rank, tensors in enumerate(cut_weights(weights or make_weights(), files, embedding_axis)):
        torch.save(tensors, folder / f"consolidated.{rank:02d}.pth")
    params = {key: value for key, value in (PARAMS | changes).items() if value is not None}
    (folder / "params.json").write_text(json.dumps(params))
    return folder


def save_changed(folder: Path, rank: int, change: Callable[[dict[str, Any]], Any]) -> None:
    """Save one rank's file again; `change` edits its dictionary or gives what stands in its place."""
    path = folder / f"consolidated.{rank:02d}.pth"
    values = torch.load(path, weights_only=True)
    changed = change(values)
    torch.save(values if changed is None else changed, path)


def repack(path: Path, compression: int = zipfile.ZIP_STORED, **records: bytes | None) -> None:
    """Write the zip again with other bytes in some records ("__" stands for "."); None leaves one out."""
    with zipfile.ZipFile(path) as archive:
        held = {name: archive.read(name) for name in archive.namelist()}
    folder = next(iter(held)).split("/")[0]
    # Without this record torch looks every other one up instead of computing where torch.save would have put it.
    changes = {"/__format_version": None, **{f"/{name}": data for name, data in records.items()}}
    held |= {folder + name.replace("__", "."): data for name, data in changes.items()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in held.items():
            if data is not None:
                archive.writestr(name, data)


def read_all(source: MetaFolder) -> dict[str, torch.Tensor]:
    return {name: source.read_rows(FileReader(), name, 0, info.shape[0]) for name, info in source.tensors.items()}


@pytest.fixture(scope="module")
def four_files(tmp_path_factory: pytest.TempPathFactory) -> MetaFolder:
    return MetaFolder(write_meta(tmp_path_factory.mktemp("four"), files=4, embedding_axis=1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("files", "embedding_axis"), CUTS)
def test_every_tensor_comes_back_bit_for_bit(tmp_path: Path, files: int, embedding_axis: int, dtype: torch.dtype) -> None:
    weights = make_weights(dtype)
    source = MetaFolder(write_meta(tmp_path, weights, files, embedding_axis))
    assert source.tensors == {name: TensorInfo(tuple(tensor.shape), ElementType.of(dtype)) for name, tensor in weights.items()}
    for name, rows in read_all(source).items():
        assert rows.is_contiguous() and rows.dtype == dtype and torch.equal(rows, weights[name]), name
    assert source.files == [tmp_path / f"consolidated.{rank:02d}.pth" for rank in range(files)]


@settings(max_examples=150, deadline=None)
@given(name=st.sampled_from(sorted(make_weights())), bounds=st.tuples(st.integers(0, VOCAB), st.integers(0, VOCAB)))
def test_any_range_of_rows_is_that_of_the_whole(four_files: MetaFolder, name: str, bounds: tuple[int, int]) -> None:
    whole = make_weights()[name]
    start, stop = sorted(min(bound, whole.shape[0]) for bound in bounds)
    rows = four_files.read_rows(FileReader(), name, start, stop)
    assert rows.is_contiguous() and torch.equal(rows, whole[start:stop])


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_a_rank_reads_the_bytes_of_its_rows_and_no_others(four_files: MetaFolder, world_size: int) -> None:
    for name, info in four_files.tensors.items():
        unit = HEAD_DIM if name.split(".")[-2] in ("q_proj", "k_proj") else 1
        row_bytes, units = info.num_bytes // info.shape[0], info.shape[0] // unit
        bounds = [units * rank // world_size * unit for rank in range(world_size + 1)]
        for start, stop in pairwise(bounds):
            reader = FileReader()
            four_files.read_rows(reader, name, start, stop)
            assert reader.read_bytes == (stop - start) * row_bytes, name


def test_a_row_within_a_head_costs_its_head_and_no_rows_cost_nothing(four_files: MetaFolder) -> None:
    reader = FileReader()
    four_files.read_rows(reader, QUERY, HEAD_DIM + 3, HEAD_DIM + 4)
    assert reader.read_bytes == HEAD_DIM * HIDDEN * 2
    assert four_files.read_rows(reader, KEY, 5, 5).shape == (0, HIDDEN)
    assert reader.read_bytes == HEAD_DIM * HIDDEN * 2


def test_scores_of_metas_rotation_are_those_of_hugging_faces(tmp_path: Path) -> None:
    write_meta(tmp_path, make_weights(torch.float32))
    stored, source = torch.load(tmp_path / "consolidated.00.pth", weights_only=True), MetaFolder(tmp_path)
    hidden = torch.randn(6, HIDDEN, generator=torch.Generator().manual_seed(1))
    angles = torch.outer(torch.arange(6.0), 10000.0 ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM))[:, None]

    def rotate_pairs(weight: torch.Tensor) -> torch.Tensor:
        pairs = torch.view_as_complex((hidden @ weight.T).view(6, -1, HEAD_DIM // 2, 2))
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(2)

    def rotate_halves(weight: torch.Tensor) -> torch.Tensor:
        low, high = (hidden @ weight.T).view(6, -1, HEAD_DIM).chunk(2, -1)
        return torch.cat([low * angles.cos() - high * angles.sin(), high * angles.cos() + low * angles.sin()], -1)

    query, key = rotate_pairs(stored["layers.1.attention.wq.weight"]), rotate_pairs(stored["layers.1.attention.wk.weight"])
    expected = torch.einsum("qhd,khd->hqk", query, key.repeat_interleave(2, 1))
    rows = read_all(source)
    scores = torch.einsum("qhd,khd->hqk", rotate_halves(rows[QUERY]), rotate_halves(rows[KEY]).repeat_interleave(2, 1))
    torch.testing.assert_close(scores, expected)


@pytest.mark.parametrize(
    ("files", "embedding_axis", "tied", "changes"),
    [(1, 0, False, {}), (2, 1, False, {"rope_theta": 1e6}), (4, 0, False, {"rope_theta": 5e5, "use_scaled_rope": True}), (4, 1, True, {})],
)
def test_logits_are_those_of_the_same_weights_in_a_hugging_face_folder(
    tmp_path: Path, build_model: Callable[..., LlamaForCausalLM], files: int, embedding_axis: int, tied: bool, changes: dict[str, Any]
) -> None:
    weights = make_weights(torch.float32, tied)
    write_meta(tmp_path / "meta", weights, files, embedding_axis, **changes)
    (tmp_path / "hf").mkdir()
    save_file(weights, tmp_path / "hf" / "model.safetensors")
    (tmp_path / "hf" / "config.json").write_text(json.dumps(MetaFolder(tmp_path / "meta").config))
    found, expected = (
        model.logits_local(model([Span(model.build_cache(40), [(7 * i) % VOCAB for i in range(40)])]))
        for model in (build_model(tmp_path / name) for name in ("meta", "hf"))
    )
    assert torch.equal(found, expected) and expected.std() > 0.05


@pytest.mark.parametrize(
    ("changes", "tied", "expected"),
    [
        ({}, False, {"max_position_embeddings": 4096, "rope_theta": 10000.0, "rms_norm_eps": 1e-5, "num_key_value_heads": KV_HEADS}),
        ({"rope_theta": 1000000}, False, {"max_position_embeddings": 16384, "rope_theta": 1e6}),
        ({"rope_theta": 500000.0, "vocab_size": VOCAB}, False, {"max_position_embeddings": 8192, "vocab_size": VOCAB}),
        ({"rope_theta": 500000.0, "use_scaled_rope": True}, True, {"max_position_embeddings": 131072, "tie_word_embeddings": True}),
    ],
)
def test_params_json_becomes_a_hugging_face_config(tmp_path: Path, changes: dict[str, Any], tied: bool, expected: dict[str, Any]) -> None:
    source = MetaFolder(write_meta(tmp_path, make_weights(torch.float16, tied), **changes))
    config = build_config(source.config)
    assert (config.hidden_size, config.intermediate_size, config.num_hidden_layers) == (HIDDEN, INTERMEDIATE, LAYERS)
    assert (config.num_attention_heads, config.head_dim, config.vocab_size, config.dtype) == (HEADS, HEAD_DIM, VOCAB, "float16")
    assert (config.bos_token_id, config.eos_token_ids, config.pad_token_id) == (1, (2,), None)
    assert {key: getattr(config, key) for key in expected} == expected
    assert (config.rope_scaling is not None) == ("use_scaled_rope" in changes)


@pytest.mark.parametrize(
    ("dim", "heads", "vocab", "factor", "ids"),
    [(2048, 32, 128256, 32.0, (128000, 128001)), (3072, 24, 128256, 32.0, (128000, 128001)), (4096, 32, 32000, 8.0, (1, 2))],
)
def test_the_factor_of_the_rope_scaling_goes_by_the_width_and_the_ids_by_the_vocabulary(
    tmp_path: Path, dim: int, heads: int, vocab: int, factor: float, ids: tuple[int, int]
) -> None:
    params = PARAMS | {"dim": dim, "n_heads": heads, "n_kv_heads": 8, "use_scaled_rope": True, "rope_theta": 500000.0}
    (tmp_path / "params.json").write_text(json.dumps(params))
    config = read_meta_params(tmp_path / "params.json").build_config(TensorInfo((vocab, dim), ElementType.BFLOAT16), 8192, tied=True)
    assert config["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    assert (config["bos_token_id"], config["eos_token_id"]) == ids


def test_params_json_without_key_value_heads_has_as_many_as_heads(tmp_path: Path) -> None:
    weights = make_weights() | {f"model.layers.{i}.self_attn.k_proj.weight": torch.ones(HIDDEN, HIDDEN).bfloat16() for i in range(LAYERS)}
    assert MetaFolder(write_meta(tmp_path, weights, n_kv_heads=None)).config["num_key_value_heads"] == HEADS


def test_a_head_that_is_the_embedding_itself_is_tied(tmp_path: Path) -> None:
    write_meta(tmp_path, make_weights(tied=True), files=2)
    for rank in range(2):
        save_changed(tmp_path, rank, lambda values: values | {"output.weight": values["tok_embeddings.weight"]})
    source = MetaFolder(tmp_path)
    assert source.config["tie_word_embeddings"] is True and "lm_head.weight" not in source.tensors
    save_changed(tmp_path, 0, lambda values: values | {"output.weight": values["tok_embeddings.weight"].clone()})
    assert MetaFolder(tmp_path).config["tie_word_embeddings"] is False


def test_offsets_are_where_the_bytes_lie_even_of_tensors_that_share_a_storage(tmp_path: Path) -> None:
    torch.manual_seed(2)
    whole = torch.randn(9, 7)
    tensors = {"whole": whole, "odd": torch.randn(13).half(), "rows": whole[3:6], "last": whole[8], "a.rope.freqs": torch.ones(2)}
    torch.save(tensors | {"bf": torch.randn(3, 5).bfloat16()}, tmp_path / "x.pth")
    header, data = read_torch_header(tmp_path / "x.pth", "rope.freqs")[0], (tmp_path / "x.pth").read_bytes()
    assert list(header) == ["whole", "odd", "rows", "last", "bf"]
    for name, stored in header.items():
        raw = data[stored.offset_bytes : stored.offset_bytes + stored.info.num_bytes]
        found = torch.frombuffer(bytearray(raw), dtype=stored.info.dtype.torch_dtype).view(stored.info.shape)
        assert torch.equal(found, tensors[name]) if name in tensors else stored.info.shape == (3, 5)


def test_tensors_beyond_four_gigabytes_are_found_and_none_is_read_at_opening(tmp_path: Path) -> None:
    path, large = tmp_path / "x.pth", 5 << 30
    # A file of holes: neither memory nor disk is taken.
    holes = torch.from_file(str(tmp_path / "holes"), shared=True, size=large // 2, dtype=torch.float16)
    tensors = {"a": torch.empty(3, 5), "b": holes.view(-1, 512), "c": torch.empty(7, 3)}
    with torch.serialization.skip_data():
        torch.save(tensors, path)
    header = read_torch_header(path, "rope.freqs")[0]
    assert path.stat().st_size > large > 1000 * path.stat().st_blocks * 512
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        for name, key in zip(tensors, "012", strict=True):
            entry = archive.getinfo(f"x/data/{key}")
            file.seek(entry.header_offset + 26)
            assert header[name].offset_bytes == entry.header_offset + 30 + sum(struct.unpack("<HH", file.read(4)))
            assert header[name].info.num_bytes == entry.file_size
    assert header["c"].offset_bytes > large


class _Call:
    """Pickles as a call."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self._call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self._call


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_pickle_that_wants_to_run_code_is_refused_and_none_is_run(tmp_path: Path, protocol: int) -> None:
    write_meta(tmp_path)
    marker = tmp_path / "ran"
    call = pickle.dumps({"norm.weight": _Call(os.mkdir, str(marker))}, protocol)
    repack(tmp_path / "consolidated.00.pth", data__pkl=call)
    with pytest.raises(CheckpointError, match=r"00\.pth wants to run code \('.*'\), which no tensor needs; none was run"):
        MetaFolder(tmp_path)
    assert not marker.exists()
    pickle.loads(call)
    assert marker.exists()


def test_a_pickle_that_asks_for_memory_is_refused_before_it_gets_any(tmp_path: Path) -> None:
    write_meta(tmp_path)
    save_changed(tmp_path, 0, lambda values: values | {"norm.weight": _Call(bytearray, 1 << 40)})
    with pytest.raises(CheckpointError, match="bytearray"):
        MetaFolder(tmp_path)


def test_a_file_cut_off_anywhere_is_refused(tmp_path: Path) -> None:
    path = write_meta(tmp_path) / "consolidated.00.pth"
    data = path.read_bytes()
    for size in [*range(0, len(data) - 300, 4099), *range(len(data) - 300, len(data), 7)]:
        path.write_bytes(data[:size])
        with pytest.raises(CheckpointError, match=rf"{size} bytes was cut off|{size} bytes is no zip file"):
            MetaFolder(tmp_path)


@pytest.fixture(scope="module")
def small_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes, dict[str, StoredTensor]]:
    path = tmp_path_factory.mktemp("small") / "x.pth"
    torch.save({f"t{i}": torch.randn(i + 1, 5) for i in range(5)}, path)
    return path, path.read_bytes(), read_torch_header(path, "rope.freqs")[0]


@settings(max_examples=50, deadline=None)
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), in_directory=st.booleans())
def test_a_flipped_bit_is_refused_or_changes_no_place(
    small_file: tuple[Path, bytes, dict[str, StoredTensor]], place: float, bit: int, in_directory: bool
) -> None:
    path, data, header = small_file
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        first = archive.start_dir if in_directory else 0
    flipped = bytearray(data)
    flipped[first + int(place * (len(data) - first))] ^= 1 << bit
    path.write_bytes(flipped)
    try:
        assert read_torch_header(path, "rope.freqs")[0] == header
    except CheckpointError as error:
        assert str(path) in str(error)


@pytest.mark.parametrize("repacked", [False, True])
def test_a_flipped_bit_that_moves_a_record_is_refused(
    tmp_path: Path, small_file: tuple[Path, bytes, dict[str, StoredTensor]], repacked: bool
) -> None:
    path = tmp_path / "x.pth"
    path.write_bytes(small_file[1])
    if repacked:
        repack(path)
    data = path.read_bytes()
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        starts = [entry.header_offset for entry in archive.infolist()]
    # The lengths of a record's name and of its padding stand there.
    for place, bit in product([start + field for start in starts for field in range(26, 30)], range(8)):
        flipped = bytearray(data)
        flipped[place] ^= 1 << bit
        path.write_bytes(flipped)
        with pytest.raises(CheckpointError, match=re.escape(str(path))):
            read_torch_header(path, "rope.freqs")


@settings(max_examples=50, deadline=None)
@given(place=st.floats(0, 1, exclude_max=True), value=st.integers(0, 255))
def test_a_changed_byte_of_the_pickle_gives_tensors_within_the_file_or_is_refused(
    small_file: tuple[Path, bytes, dict[str, StoredTensor]], place: float, value: int
) -> None:
    path, data, _ = small_file
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        held = archive.read("x/data.pkl")
    changed = bytearray(held)
    changed[int(place * len(held))] = value
    # With the right checksum, so that the damage is not noticed at once.
    path.write_bytes(data.replace(held, changed).replace(struct.pack("<I", zlib.crc32(held)), struct.pack("<I", zlib.crc32(changed))))
    try:
        for stored in read_torch_header(path, "rope.freqs")[0].values():
            assert 0 < stored.offset_bytes <= stored.offset_bytes + stored.info.num_bytes <= len(data)
    except CheckpointError as error:
        assert str(path) in str(error)


def test_lengths_that_are_lies_cost_no_memory(tmp_path: Path) -> None:
    path = write_meta(tmp_path) / "consolidated.00.pth"
    data = path.read_bytes()
    size, entries = 3 << 30, 20
    end = struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, entries, entries, size, 4, 0)
    with path.open("wb") as file:
        file.write(data[:4])
        file.truncate(size + 4)
        file.seek(size + 4)
        file.write(end)
    with pytest.raises(CheckpointError, match=f"{size} bytes are said to belong together"):
        MetaFolder(tmp_path)


def strided(values: dict[str, Any]) -> dict[str, Any]:
    return values | {"output.weight": values["output.weight"].T.contiguous().T}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda values: [*values.values()], "holds a list, but a dictionary of tensors by name is needed"),
        (lambda values: {7: values["norm.weight"]}, "a dictionary of tensors by name is needed"),
        (lambda values: {"model": values}, "'model' is a dict, but only tensors are read"),
        (
            lambda values: values | {"norm.weight": values["norm.weight"].to(torch.int8)},
            "'norm.weight' is int8, but only float16, bfloat16",
        ),
        (strided, r"'output.weight' has strides \(1, 120\), but only row after row"),
        (lambda values: values | {"lora.weight": torch.ones(2)}, "holds 'lora.weight', which no text model of Meta's has"),
        (lambda values: values | {"layers.01.ffn_norm.weight": torch.ones(2)}, "holds 'layers.01.ffn_norm.weight'"),
        (lambda values: values | {"norm.weight": torch.ones(4, 4)}, r"norm.weight has the shape \[4, 4\]"),
        (lambda values: values | {"norm.weight": torch.ones(0)}, r"norm.weight has the shape \[0\]"),
        (lambda values: {k: v for k, v in values.items() if k[:8] != "layers.1"}, "holds 1 layers, but params.json says 2"),
        (lambda values: {k: v for k, v in values.items() if k[:3] != "tok"}, "lacks model.embed_tokens.weight"),
        (lambda values: values | {"tok_embeddings.weight": torch.ones(VOCAB, 16)}, "has 16 columns in each of 1 files, .* dim 64"),
        (
            lambda values: values | {"layers.0.attention.wq.weight": torch.ones(32, 64)},
            "wq.weight has 32 rows in 1 files, but 8 heads need 64",
        ),
    ],
)
def test_what_is_no_llama_is_refused_by_name(tmp_path: Path, change: Callable[[dict[str, Any]], Any], message: str) -> None:
    write_meta(tmp_path)
    save_changed(tmp_path, 0, change)
    with pytest.raises(CheckpointError, match=message):
        MetaFolder(tmp_path)


@pytest.mark.parametrize(
    ("records", "compression", "message"),
    [
        ({"byteorder": b"big"}, zipfile.ZIP_STORED, "byte order b'big'"),
        ({}, zipfile.ZIP_DEFLATED, "data.pkl is compressed or encrypted"),
        ({"data/0": b"\0" * 100}, zipfile.ZIP_STORED, "reaches byte 15360 of its record, which has 100 bytes"),
        ({"data/0": None}, zipfile.ZIP_STORED, "cannot be read"),
        ({"data__pkl": None}, zipfile.ZIP_STORED, "holds no data.pkl"),
        ({"byteorder": None, "ByteOrder": b"big"}, zipfile.ZIP_STORED, "byte order b'big'"),
        ({"data__pkl": b"\x80\x02}." + bytes(5 << 20)}, zipfile.ZIP_STORED, f"{(5 << 20) + 4} bytes are said to belong together"),
        ({"version": bytes(5 << 20)}, zipfile.ZIP_STORED, "are said to belong together"),
        ({"__format_version": b"1"}, zipfile.ZIP_STORED, "where no record begins: save it again with torch.save"),
    ],
)
def test_records_that_torch_does_not_write_are_refused(
    tmp_path: Path, records: dict[str, bytes | None], compression: int, message: str
) -> None:
    path = write_meta(tmp_path) / "consolidated.00.pth"
    repack(path, compression, **records)
    with pytest.raises(CheckpointError, match=message):
        MetaFolder(tmp_path)


def test_a_zip_that_was_written_again_as_it_is_stays_readable(tmp_path: Path) -> None:
    repack(write_meta(tmp_path) / "consolidated.00.pth")
    weights = make_weights()
    assert all(torch.equal(rows, weights[name]) for name, rows in read_all(MetaFolder(tmp_path)).items())


def test_a_record_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    path = write_meta(tmp_path) / "consolidated.00.pth"
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("consolidated.00/data/0", b"other")
    with pytest.raises(CheckpointError, match=r"holds \d+ records, but \d+ names in consolidated\.00/"):
        MetaFolder(tmp_path)


def test_a_record_of_another_folder_is_refused(tmp_path: Path) -> None:
    path = write_meta(tmp_path) / "consolidated.00.pth"
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("other/byteorder", b"big")
    with pytest.raises(CheckpointError, match=r"holds \d+ records, but \d+ names in consolidated\.00/"):
        MetaFolder(tmp_path)


def test_a_file_from_before_torch_1_6_is_refused_with_what_to_do(tmp_path: Path) -> None:
    path = write_meta(tmp_path) / "consolidated.00.pth"
    torch.save(torch.load(path, weights_only=True), path, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=f"of {path.stat().st_size} bytes is no zip file.* save it again with a current torch"):
        MetaFolder(tmp_path)


def test_a_rank_that_is_missing_is_named(tmp_path: Path) -> None:
    write_meta(tmp_path, files=4)
    (tmp_path / "consolidated.01.pth").unlink()
    with pytest.raises(CheckpointError, match=r"holds 3 files, but consolidated\.02\.pth is there instead of consolidated\.01\.pth"):
        MetaFolder(tmp_path)


@pytest.mark.parametrize("embedding_axis", [0, 1])
def test_last_ranks_that_are_missing_are_noticed_by_the_shapes(tmp_path: Path, embedding_axis: int) -> None:
    write_meta(tmp_path, files=4, embedding_axis=embedding_axis)
    (tmp_path / "consolidated.03.pth").unlink()
    with pytest.raises(CheckpointError, match=r"3 files, but .*: copy the files of all ranks"):
        MetaFolder(tmp_path)


def test_one_file_without_a_number_is_read_but_not_beside_numbered_ones(tmp_path: Path) -> None:
    write_meta(tmp_path)
    (tmp_path / "consolidated.00.pth").rename(tmp_path / "consolidated.pth")
    assert is_meta(tmp_path) and MetaFolder(tmp_path).files == [tmp_path / "consolidated.pth"]
    write_meta(tmp_path)
    with pytest.raises(CheckpointError, match=r"1 consolidated\.pth and 1 files consolidated\.NN\.pth"):
        MetaFolder(tmp_path)


@pytest.mark.parametrize(
    ("change", "expected", "found"),
    [
        (lambda values: {k: v for k, v in values.items() if k != "layers.1.ffn_norm.weight"}, r"bfloat16 \[64\]", "missing"),
        (lambda values: values | {"layers.1.ffn_norm.weight": torch.ones(HIDDEN).half()}, r"bfloat16 \[64\]", r"float16 \[64\]"),
        (lambda values: values | {"layers.1.ffn_norm.weight": torch.ones(3).bfloat16()}, r"bfloat16 \[64\]", r"bfloat16 \[3\]"),
        (lambda values: values | {"layers.1.more.weight": torch.ones(3)}, "missing", r"float32 \[3\]"),
    ],
)
def test_files_that_differ_are_refused_with_file_and_tensor(
    tmp_path: Path, change: Callable[[dict[str, Any]], Any], expected: str, found: str
) -> None:
    write_meta(tmp_path, files=2)
    save_changed(tmp_path, 1, change)
    with pytest.raises(CheckpointError, match=rf"'layers\.1\.\w+\.weight' is {expected} in .*00\.pth, but {found} in .*01\.pth"):
        MetaFolder(tmp_path)


def test_ranks_that_repeat_key_value_heads_are_refused(tmp_path: Path) -> None:
    weights = make_weights() | {f"model.layers.{i}.self_attn.k_proj.weight": torch.ones(32, HIDDEN).bfloat16() for i in range(LAYERS)}
    write_meta(tmp_path, weights, files=4, n_kv_heads=2)
    with pytest.raises(CheckpointError, match=r"wk\.weight has 32 rows in 4 files, but 2 heads need 16: ranks that repeat heads"):
        MetaFolder(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "does not exist"),
        ("", "is empty: download or copy it again"),
        ("{", "is not JSON"),
        ("[1]", "holds a list"),
        ("{}", "dim is None, but a whole number above 0"),
        (json.dumps(PARAMS | {"dim": "64"}), "dim is '64'"),
        (json.dumps(PARAMS | {"n_heads": True}), "n_heads is True"),
        (json.dumps(PARAMS | {"n_kv_heads": 0}), "n_kv_heads is 0"),
        (json.dumps(PARAMS | {"n_layers": 1.5}), "n_layers is 1.5"),
        (json.dumps(PARAMS | {"norm_eps": float("nan")}), "norm_eps is nan, but a number above 0"),
        (json.dumps(PARAMS | {"rope_theta": 10**400}), "rope_theta is 1000"),
        (json.dumps(PARAMS | {"n_heads": 7}), "dim 64 does not divide into 7 heads"),
        (json.dumps(PARAMS | {"n_heads": 64}), "dim 64 does not divide into 64 heads of an even width"),
        (json.dumps(PARAMS | {"head_dim": 32}), f"head_dim is 32, but only dim / n_heads, {HIDDEN // HEADS}, is supported"),
        (json.dumps(PARAMS | {"sliding_window": 4096}), "sliding_window is 4096, but only null is supported"),
        (json.dumps(PARAMS | {"moe": {"num_experts": 8}}), "moe is .*, but only null is supported"),
    ],
)
def test_a_params_json_that_makes_no_sense_is_a_config_error(tmp_path: Path, text: str | None, message: str) -> None:
    file = write_meta(tmp_path) / "params.json"
    file.unlink() if text is None else file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        MetaFolder(tmp_path)


@settings(max_examples=50, deadline=None)
@given(place=st.floats(0, 1, exclude_max=True), value=st.integers(0, 255))
def test_a_changed_byte_of_params_json_is_read_or_an_input_error(small_file: tuple[Path, bytes, object], place: float, value: int) -> None:
    file, data = small_file[0].parent / "params.json", bytearray(json.dumps(PARAMS), "ascii")
    data[int(place * len(data))] = value
    file.write_bytes(data)
    try:
        read_meta_params(file)
    except ConfigError as error:
        assert str(file) in str(error)


def test_more_layers_than_the_files_hold_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds 2 layers, but params\.json says 1000000000000"):
        MetaFolder(write_meta(tmp_path, n_layers=10**12))


def test_checklist_chk_gives_the_checksums_of_the_files_it_lists(tmp_path: Path) -> None:
    write_meta(tmp_path, files=2)
    assert {one.recorded_in for one in MetaFolder(tmp_path).checksums.values()} == {"its zip directory"}
    sums = [hashlib.md5((tmp_path / f"consolidated.0{rank}.pth").read_bytes()).hexdigest() for rank in range(2)]
    lines = [f"{sums[0]}  consolidated.00.pth", "0" * 32 + "  params.json", "not a checksum", f"{sums[1].upper()} *./consolidated.01.pth\r"]
    (tmp_path / "checklist.chk").write_text("\n".join(lines))
    assert MetaFolder(tmp_path).checksums == {
        tmp_path / f"consolidated.0{rank}.pth": Checksum("md5", sums[rank], "checklist.chk") for rank in range(2)
    }
    (tmp_path / "checklist.chk").write_bytes(bytes(range(256)))
    assert {one.recorded_in for one in MetaFolder(tmp_path).checksums.values()} == {"its zip directory"}


@settings(max_examples=150, deadline=None)
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_one_flipped_bit_is_found_or_changes_no_tensor(meta_folder: Path, place: float, bit: int) -> None:
    file, expected = meta_folder / "consolidated.00.pth", read_all(MetaFolder(meta_folder))
    data = file.read_bytes()
    flipped = bytearray(data)
    flipped[int(place * len(data))] ^= 1 << bit
    try:
        file.write_bytes(flipped)
        source = MetaFolder(meta_folder)
        require_intact(source)
        found = read_all(source)
    except CheckpointError:
        return
    finally:
        file.write_bytes(data)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_damaged_tensor_names_the_file_and_both_checksums(meta_folder: Path) -> None:
    file, source = meta_folder / "consolidated.00.pth", MetaFolder(meta_folder)
    begin, length = max(source.checksums[file].spans, key=lambda span: span[1])
    data = file.read_bytes()
    for place in (begin, begin + length // 2, begin + length - 1):
        file.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(CheckpointError, match=r"00\.pth is damaged: its checksum is \w{8}, but its zip directory says \w{8}"):
            require_intact(MetaFolder(meta_folder))
    file.write_bytes(data)
    require_intact(MetaFolder(meta_folder))


@pytest.mark.parametrize("key", ["quantization_args", "lora_args", "vision_chunk_size"])
def test_params_of_what_is_not_supported_are_refused_by_name(tmp_path: Path, key: str) -> None:
    with pytest.raises(ConfigError, match=rf"params\.json: {key} is 3, but only null is supported"):
        MetaFolder(write_meta(tmp_path, **{key: 3}))


@pytest.fixture(scope="module")
def meta_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that is damaged and mended again."""
    return write_meta(tmp_path_factory.mktemp("meta"))


def test_the_tokenizer_lies_in_the_folder_or_the_one_above(tmp_path: Path) -> None:
    source = MetaFolder(write_meta(tmp_path / "llama" / "7B"))
    assert source.tokenizer_path() is None
    (tmp_path / "llama" / "tokenizer.model").touch()
    assert source.tokenizer_path() == tmp_path / "llama"
    (tmp_path / "llama" / "7B" / "tokenizer.json").touch()
    assert source.tokenizer_path() == tmp_path / "llama" / "7B"


def test_a_folder_of_metas_is_told_from_others(tmp_path: Path) -> None:
    assert not is_meta(tmp_path) and not is_meta(tmp_path / "nothing")
    (tmp_path / "consolidated.00.pth").touch()
    assert not is_meta(tmp_path)
    (tmp_path / "params.json").touch()
    assert is_meta(tmp_path) and not is_meta(tmp_path / "params.json")
    (tmp_path / "consolidated.00.pth").unlink()
    assert not is_meta(tmp_path)


def test_a_path_that_is_no_folder_of_metas_is_an_input_error(tmp_path: Path) -> None:
    (tmp_path / "params.json").write_text(json.dumps(PARAMS))
    with pytest.raises(CheckpointError, match=re.escape(f"{tmp_path} holds 0 consolidated.pth and 0 files")):
        MetaFolder(tmp_path)
    with pytest.raises(CheckpointError, match="is no folder"):
        MetaFolder(tmp_path / "params.json")
