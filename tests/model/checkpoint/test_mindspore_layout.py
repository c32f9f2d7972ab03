"""How MindFormers spreads a checkpoint over folders: every layout gives the tensors of the one-file form, or says what is missing."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from launcher.settings.yaml_settings import read_settings
from model.checkpoint.formats import OpenOptions, find_format, open_checkpoint
from model.checkpoint.mindspore_container import MindSporeContainer
from model.checkpoint.mindspore_file import MindSporeFile
from model.export.rank_files import write_rank_files
from model.spec.config import build_config
from model.spec.linear_scheme import LinearScheme
from model.spec.scheme import Scheme, read_scheme
from model.spec.weights import plan_weights
from parallel.errors import CheckpointError
from parallel.file_slices import FileReader
from tests.model.mindspore_files import (
    CONFIG,
    LINEARS,
    check_complete,
    check_same,
    cut,
    fuse,
    interleave,
    make_float,
    make_plain,
    make_rtn,
    read_all,
    write_ckpt,
)

Tensors = Mapping[str, torch.Tensor]


def write_rank(folder: Path, rank: int, tensors: Tensors, name: str = "checkpoint_{rank}.ckpt") -> None:
    target = folder / f"rank_{rank}" / name.format(rank=rank)
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.suffix == ".safetensors":
        save_file(dict(tensors), target, metadata={"format": "ms"})
    else:
        write_ckpt(target, tensors)
    (target.parent / f"ckpt_strategy_rank_{rank}.ckpt").write_bytes(b"of another format")


def split_stages(tensors: Tensors) -> list[dict[str, torch.Tensor]]:
    """Two pipeline stages of a layer each; the head shares the embedding's stage number with the last."""
    first = {name: tensor for name, tensor in tensors.items() if "layers.0." in name or "tok_embeddings" in name}
    return [first, {name: tensor for name, tensor in tensors.items() if name not in first}]


def write_steps(folder: Path, tensors: Tensors) -> None:
    for rank, part in enumerate(cut(tensors, 2)):
        old = {name: tensor + 1 for name, tensor in part.items()}
        # By name the last is another: numbers are compared, not words.
        for step, content in (("1_9", old), ("2_10", part), ("2_9", old)):
            write_rank(folder, rank, content, f"llama_rank_{{rank}}-{step}.ckpt")


def write_replicas(folder: Path, tensors: Tensors) -> None:
    for rank in range(3):
        write_rank(folder, rank, tensors)


def write_replicas_of_slices(folder: Path, tensors: Tensors) -> None:
    for rank in range(4):
        write_rank(folder, rank, cut(tensors, 2)[rank % 2])


def write_stages(folder: Path, tensors: Tensors) -> None:
    for rank, part in enumerate(split_stages(tensors)):
        write_rank(folder, rank, part)


def write_stages_of_slices(folder: Path, tensors: Tensors) -> None:
    for stage, whole in enumerate(split_stages(tensors)):
        for rank, part in enumerate(cut(whole, 2)):
            write_rank(folder, 2 * stage + rank, part)


def write_stages_that_share_the_embedding(folder: Path, tensors: Tensors) -> None:
    name = "model.tok_embeddings.embedding_weight"
    for rank, part in enumerate(split_stages(tensors)):
        write_rank(folder, rank, {**part, name: tensors[name]})


def write_parts(folder: Path, tensors: Tensors) -> None:
    names = list(tensors)
    write_ckpt(folder / "part1.ckpt", {name: tensors[name] for name in names[::2]}, crc=True)
    write_ckpt(folder / "part2.ckpt", {name: tensors[name] for name in names[1::2]})
    (folder / "ckpt_strategy_rank_0.ckpt").write_bytes(b"of another format")


def write_named_safetensors(folder: Path, tensors: Tensors) -> None:
    names = list(tensors)
    places = {name: f"model-{1 + (number % 2):05}-of-00002.safetensors" for number, name in enumerate(names)}
    for file in sorted(set(places.values())):
        save_file({name: tensors[name] for name in names if places[name] == file}, folder / file, metadata={"format": "ms"})
    save_file({"global_step": torch.tensor([3], dtype=torch.int32)}, folder / "hyper_param.safetensors", metadata={"format": "ms"})
    (folder / "param_name_map.json").write_text(json.dumps(places))


def write_single_safetensors(folder: Path, tensors: Tensors) -> None:
    save_file(dict(tensors), folder / "llama.safetensors", metadata={"format": "ms"})


def write_safetensors_as_hugging_face_calls_them(folder: Path, tensors: Tensors) -> None:
    save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "ms"})


def write_rank_safetensors(folder: Path, tensors: Tensors) -> None:
    for rank, part in enumerate(cut(tensors, 2)):
        write_rank(folder, rank, part, "llama_rank_{rank}-1_1.safetensors")


def write_counters(folder: Path, tensors: Tensors) -> None:
    """Ranks of a training with states of their own."""
    for rank, part in enumerate(cut(tensors, 2)):
        write_rank(folder, rank, {**part, "global_step": torch.tensor([7]), f"adam_m.extra_{rank}.weight": torch.ones(2, 2)})


def write_flat_ranks(folder: Path, tensors: Tensors) -> None:
    """All ranks and steps in one folder, told apart by their names."""
    for rank, part in enumerate(cut(tensors, 2)):
        for step, content in (("1_9", {name: tensor + 1 for name, tensor in part.items()}), ("2_10", part)):
            write_ckpt(folder / f"llama_rank_{rank}-{step}.ckpt", content)
    (folder / "ckpt_strategy_rank_0.ckpt").write_bytes(b"of another format")


def write_spread_replicas(folder: Path, tensors: Tensors) -> None:
    """remove_redundancy: each of two replicas of two slices writes a part of what they share, and one rank what all share."""
    slices, whole = cut(tensors, 2), [name for name in tensors if "norm" in name]
    for rank in range(4):
        mine = {name: tensor for number, (name, tensor) in enumerate(slices[rank % 2].items()) if number % 2 == rank // 2}
        kept = {name: tensor for name, tensor in mine.items() if name not in whole or whole.index(name) % 4 == rank}
        write_rank(folder, rank, kept | {name: tensors[name] for place, name in enumerate(whole) if place % 4 == rank})


LAYOUTS = (
    write_steps,
    write_spread_replicas,
    write_flat_ranks,
    write_replicas,
    write_replicas_of_slices,
    write_stages,
    write_stages_of_slices,
    write_stages_that_share_the_embedding,
    write_parts,
    write_named_safetensors,
    write_single_safetensors,
    write_safetensors_as_hugging_face_calls_them,
    write_rank_safetensors,
    write_counters,
)


@pytest.mark.parametrize("kind", [make_float, make_rtn])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_tensors_of_one_file(
    tmp_path: Path, layout: Callable[[Path, Tensors], None], kind: Callable[[], dict[str, torch.Tensor]]
) -> None:
    tensors = kind()
    expected = MindSporeFile(write_ckpt(tmp_path / "whole.ckpt", tensors), CONFIG)
    folder = tmp_path / "layout"
    folder.mkdir()
    layout(folder, tensors)
    assert find_format(folder) == "mindspore"
    source = open_checkpoint(folder, OpenOptions(values=CONFIG))
    assert isinstance(source, MindSporeFile)
    check_complete(source)
    check_same(source, expected)
    assert MindSporeContainer(folder).list_problems() == []
    # A rank reads its own rows, once, of one replica.
    specs = plan_weights(build_config(source.config), read_scheme(source.config))
    total, reader = 0, FileReader()
    for name, spec in specs.items():
        for rank in range(2):
            source.read_rows(reader, name, *spec.rows(rank, 2))
    total = reader.read_bytes
    once = sum(info.num_bytes for info in source.tensors.values())
    assert total <= 1.05 * once
    # It is resharded, reading everything once.
    assert write_rank_files(source, build_config(source.config), read_scheme(source.config), 2, tmp_path / "two") <= 1.05 * once
    two = open_checkpoint(tmp_path / "two")
    for name, info in source.tensors.items():
        assert torch.equal(two.read_rows(reader, name, 0, info.shape[0]), read_all(source, name))
    reader.close()


@pytest.fixture
def ranks(tmp_path: Path) -> Path:
    folder = tmp_path / "ranks"
    for rank, part in enumerate(cut(make_float(), 2)):
        write_rank(folder, rank, part, "llama_rank_{rank}-1_2.ckpt")
    assert MindSporeFile(folder, CONFIG).tensors
    return folder


def refuse(path: Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(path, OpenOptions(format="mindspore", values=CONFIG))


def test_one_of_several_slices_is_named_as_such(ranks: Path) -> None:
    one = r"is one of them, but each tensor was cut into 2 slices: give the folder that holds the rank_N folders of all 2"
    refuse(ranks / "rank_0", one)
    refuse(ranks / "rank_1" / "llama_rank_1-1_2.ckpt", one)
    shutil.rmtree(ranks / "rank_0")
    refuse(ranks, "holds rank_1, but no rank_0: copy the folders of all ranks")
    assert find_format(ranks) == "mindspore"
    (ranks / "rank_1").rename(ranks / "rank_0")
    refuse(ranks, one)


def test_a_folder_of_a_missing_slice_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "ranks"
    for rank, part in enumerate(cut(make_float(), 2)):
        write_rank(folder, rank, part)
    write_rank(folder, 2, cut(make_float(), 2)[0])
    refuse(folder, "ranks holds 3 ranks, but each tensor was cut into 2 slices")


def test_ranks_at_different_steps_are_refused(ranks: Path) -> None:
    write_rank(ranks, 1, cut(make_float(), 2)[1], "llama_rank_{rank}-2_2.ckpt")
    refuse(
        ranks, r"of different steps: .*rank_0.* is epoch 1 step 2, .*rank_1-2_2\.ckpt is epoch 2 step 2; copy the same step of all ranks"
    )
    (ranks / "rank_1" / "llama_rank_1-2_2.ckpt").unlink()
    (ranks / "rank_1" / "llama_rank_1-1_2.ckpt").rename(ranks / "rank_1" / "checkpoint_1.ckpt")
    refuse(ranks, r"rank_0.* is epoch 1 step 2, .*checkpoint_1\.ckpt is of no step")


def test_files_of_several_names_are_refused(ranks: Path) -> None:
    write_rank(ranks, 1, cut(make_float(), 2)[1], "other_rank_{rank}-1_2.ckpt")
    refuse(ranks, r"rank_1 holds 2 files of more than one name, llama_rank_1-1_2\.ckpt and other_rank_1-1_2\.ckpt among them")
    (ranks / "rank_1" / "other_rank_1-1_2.ckpt").rename(ranks / "rank_1" / "llama_rank_1_1-1_2.ckpt")
    refuse(ranks, r"rank_1 holds 2 files of step epoch 1 step 2")


def test_files_of_ranks_in_one_folder_are_held_to_the_same_rules(tmp_path: Path) -> None:
    folder = tmp_path / "flat"
    folder.mkdir()
    parts = cut(make_float(), 2)
    write_ckpt(folder / "llama_rank_1-1_2.ckpt", parts[1])
    refuse(folder, "llama_rank_1-1_2.ckpt is one of them, but each tensor was cut into 2 slices")
    write_ckpt(folder / "llama_rank_2-1_2.ckpt", parts[0])
    refuse(folder, "flat holds a file of rank_2, but none of rank_0: copy the files of all ranks")
    (folder / "llama_rank_2-1_2.ckpt").rename(folder / "llama_rank_0-2_2.ckpt")
    refuse(folder, r"of different steps: .*llama_rank_0-2_2\.ckpt is epoch 2 step 2, .*llama_rank_1-1_2\.ckpt is epoch 1 step 2")


def test_two_containers_in_one_folder_are_refused(tmp_path: Path) -> None:
    write_ckpt(tmp_path / "a.ckpt", make_float())
    save_file(make_float(), tmp_path / "b.safetensors", metadata={"format": "ms"})
    refuse(tmp_path, r"holds both a\.ckpt and b\.safetensors: leave only the \.ckpt or only the \.safetensors files in it")


def test_the_tokenizer_may_be_in_the_folder_around_the_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "ckpt"
    write_replicas(folder, make_float())
    assert MindSporeFile(folder, CONFIG).tokenizer_path() is None
    (tmp_path / "tokenizer.model").touch()
    source = MindSporeFile(folder, CONFIG)
    assert source.tokenizer_path() == tmp_path
    assert source.notes == [f"{folder} holds no tokenizer: that of {tmp_path} is used"]
    (folder / "tokenizer.model").touch()
    for path in (folder, folder / "rank_0" / "checkpoint_0.ckpt"):
        assert MindSporeFile(path, CONFIG).tokenizer_path() == folder


def test_replicas_that_differ_are_refused(tmp_path: Path) -> None:
    tensors = make_float()
    write_rank(tmp_path, 0, tensors)
    changed = dict(tensors)
    name = "model.layers.1.feed_forward.w1.weight"
    changed[name] = tensors[name].clone()
    changed[name][-1, -1] += 1
    write_rank(tmp_path, 1, changed)
    refuse(tmp_path, r"w1\.weight differs in .*, which hold the same slice of the model: give the files of one run")


@pytest.mark.parametrize(("replicas", "slices"), [(2, 1), (4, 1), (2, 2)])
@pytest.mark.parametrize("form", ["separate", "1.3", "1.4"])
def test_rows_cut_by_the_parallel_optimizer_are_joined(tmp_path: Path, replicas: int, slices: int, form: str) -> None:
    tensors = make_float()
    expected = MindSporeFile(write_ckpt(tmp_path / "whole.ckpt", tensors), CONFIG)
    folder = tmp_path / "shards"
    for number, part in enumerate(cut(tensors, slices)):
        content = part if form == "separate" else fuse(part) if form == "1.3" else interleave(fuse(part), 4 // slices, 2 // slices)
        for replica in range(replicas):
            # Small tensors stay whole.
            mine = {name: tensor.chunk(replicas)[replica].contiguous() if tensor.dim() > 1 else tensor for name, tensor in content.items()}
            write_rank(folder, replica * slices + number, mine)
    source = MindSporeFile(folder, CONFIG, fused_order=None if form == "separate" else form)
    check_complete(source)
    check_same(source, expected)


def test_shards_that_are_not_all_there_are_refused(tmp_path: Path) -> None:
    for rank in range(4):
        write_rank(tmp_path, rank, {n: t.chunk(4)[rank].contiguous() if t.dim() > 1 else t for n, t in make_float().items()})
    assert MindSporeFile(tmp_path, CONFIG).tensors
    shutil.rmtree(tmp_path / "rank_3")
    refuse(tmp_path, r"holds 1/4 of the rows of each of 1 slices \(enable_parallel_optimizer\): 4 ranks are needed, but there are 3")
    shutil.copytree(tmp_path / "rank_0", tmp_path / "rank_3")
    refuse(tmp_path, r"rank_0/checkpoint_0\.ckpt and .*rank_3/checkpoint_0\.ckpt hold the same slice of each tensor")
    shutil.rmtree(tmp_path / "rank_3")
    for rank in range(4):
        parts = {n: t.chunk(4)[rank].contiguous() if t.dim() > 1 else t for n, t in make_float().items()}
        write_rank(tmp_path, rank, parts | {"model.layers.0.attention.wq.weight": torch.randn(13, 64)})
    refuse(
        tmp_path, r"wq\.weight has 13 rows, but 64 of each slice, or 1/4 of them, are needed: this checkpoint was cut over data-parallel"
    )


def test_stages_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    first, second = split_stages(make_float())
    write_rank(tmp_path, 0, first)
    write_rank(tmp_path, 1, first)
    write_rank(tmp_path, 2, second)
    refuse(tmp_path, "its pipeline stages have 2, 1 ranks, but all have the same number")
    shutil.rmtree(tmp_path / "rank_1")
    (tmp_path / "rank_2").rename(tmp_path / "rank_1")
    (tmp_path / "rank_2").mkdir()
    refuse(tmp_path, "rank_2 holds no .ckpt and no .safetensors file")


def test_a_name_map_that_lies_is_refused(tmp_path: Path) -> None:
    write_named_safetensors(tmp_path, make_float())
    file = tmp_path / "param_name_map.json"
    named = json.loads(file.read_text())
    for change, message in (
        (
            {"lm_head.weight": "model-00001-of-00002.safetensors", "model.x": "model-00002-of-00002.safetensors"},
            "that are not in the files",
        ),
        ({"lm_head.weight": "../x.safetensors"}, "which is no safetensors file of its folder"),
        ({"lm_head.weight": "model-00003-of-00002.safetensors"}, "lacks 1 of the 3 files"),
    ):
        file.write_text(json.dumps({**named, **change}))
        refuse(tmp_path, message)


@pytest.mark.parametrize(
    ("weight", "scale", "zero"),
    [
        ("_handler.weight", "_weight_quantizer.scale", "_weight_quantizer.zp_neg"),
        ("_layer.weight", "_layer.matmul.weight_scale", "_layer.matmul.weight_zp"),
    ],
)
def test_scales_alone_mean_activations_rounded_for_each_token(tmp_path: Path, weight: str, scale: str, zero: str) -> None:
    """Golden Stick 1.0 stores zero points for int8 weights beside float activations, and none for int8 activations."""
    tensors = make_plain(torch.float16)
    for name, (rows, columns) in ((f"model.layers.{n}.{name}", shape) for n in range(2) for name, shape in LINEARS.items()):
        tensors[f"{name}.{weight}"] = torch.randint(-128, 128, (rows, columns), dtype=torch.int8)
        tensors[f"{name}.{scale}"] = torch.rand(rows)
    source = MindSporeFile(write_ckpt(tmp_path / "x.ckpt", tensors), CONFIG)
    check_complete(source)
    assert read_scheme(source.config) == Scheme(LinearScheme(packed=False, activation="token"), ("lm_head",))
    (note,) = source.notes
    assert "scales without zero points: Golden Stick 1.0, activations rounded to int8 for each token" in note
    for name in [name for name in tensors if name.endswith(weight)]:
        tensors[name.removesuffix(weight) + zero] = torch.zeros(tensors[name].shape[0])
    source = MindSporeFile(write_ckpt(tmp_path / "x.ckpt", tensors), CONFIG)
    assert read_scheme(source.config).name == "rtn-a16w8"
    assert source.notes == []
    # Golden Stick 1.0 writes it below `_layer.matmul`.
    for name in ("smooth_scale", "_input_quantizer.smooth_scale"):
        changed = {**tensors, f"model.layers.0.attention.wq.{name}": torch.ones(64)}
        with pytest.raises(CheckpointError, match=r"wq\..*smooth_scale.*, which is no form"):
            MindSporeFile(write_ckpt(tmp_path / "x.ckpt", changed), CONFIG)


REAL = (
    "L05-two-steps-each-rank",
    "L08-pipeline-2",
    "L09-dp2-replicas",
    "L14-ms-safetensors-param-map",
    "L16-ms-safetensors-ranks",
)


@pytest.mark.parametrize("name", REAL)
def test_real_layouts(shared_dir: Path, name: str) -> None:
    folder = shared_dir / "cases" / "mindformers"
    if not (folder / name).is_dir():
        pytest.skip(f"no cases/mindformers/{name} among the shared data")
    values = read_settings(folder / "fused.yaml").build_model_values()
    source = open_checkpoint(folder / name, OpenOptions(values=values))
    assert isinstance(source, MindSporeFile)
    truth = open_checkpoint(shared_dir / "data" / "stories260K-hf")
    assert source.tensors.keys() == truth.tensors.keys()
    reader = FileReader()
    for tensor, info in truth.tensors.items():
        assert torch.equal(read_all(source, tensor), truth.read_rows(reader, tensor, 0, info.shape[0]))
    reader.close()


def test_one_slice_under_two_ranks_is_refused(tmp_path: Path) -> None:
    parts = cut(make_float(), 2)
    for rank, part in enumerate([parts[0], parts[0]]):
        write_rank(tmp_path, rank, part)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    words = r"rank_0/checkpoint_0\.ckpt and .*rank_1/checkpoint_1\.ckpt hold the same slice of each tensor, but should hold different"
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(tmp_path)
