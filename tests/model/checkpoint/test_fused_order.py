"""Row order of MindFormers' fused weights: both orders read back, told apart by the weights, or refused."""

from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import model.checkpoint.mindspore_order as mindspore_order
import model.checkpoint.mindspore_rows as mindspore_rows
from launcher.settings.yaml_settings import read_settings
from model.checkpoint.formats import OpenOptions, open_checkpoint, settle_options
from model.checkpoint.fused_order import RowNorms, weigh_orders
from model.checkpoint.mindspore_encryption import EncryptedFile
from model.checkpoint.mindspore_file import MindSporeFile
from model.checkpoint.mindspore_header import read_mindspore_header
from model.checkpoint.mindspore_order import sample_fused
from model.checkpoint.mindspore_rows import RowRuns, build_block
from model.spec.config import build_config
from model.spec.scheme import read_scheme
from model.spec.weights import plan_weights
from parallel.errors import CheckpointError
from parallel.file_slices import FileReader
from tests.model.mindspore_files import (
    CONFIG,
    FUSED,
    add_difference,
    check_complete,
    check_same,
    cut,
    fuse,
    interleave,
    make_a8w8,
    make_float,
    make_rtn,
    read_all,
    write_ckpt,
    write_ranks,
)

MAKERS: dict[str, Callable[[], dict[str, torch.Tensor]]] = {
    "float": make_float,
    "rtn": make_rtn,
    "smooth_quant": lambda: make_a8w8(ptq=False),
    "ptq": lambda: make_a8w8(ptq=True),
}


def make(kind: str) -> dict[str, torch.Tensor]:
    """Tensors whose parts of a fused input have one divisor, as a fused linear stores it."""
    tensors = add_difference(MAKERS[kind]())
    for layer in range(2):
        for first, *others in FUSED.values():
            for part in others:
                for rest in ("_input_quantizer.t_scale", "input_scale"):
                    if (name := f"model.layers.{layer}.{part}.{rest}") in tensors:
                        tensors[name] = tensors[f"model.layers.{layer}.{first}.{rest}"]
    return tensors


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("order", ["1.3", "1.4"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_both_orders_give_the_separate_tensors(tmp_path: Path, kind: str, order: str, ranks: int) -> None:
    tensors = make(kind)
    expected = MindSporeFile(write_ckpt(tmp_path / "separate.ckpt", tensors), CONFIG)
    parts = [fuse(part) for part in cut(tensors, ranks)]
    if order == "1.4":
        parts = [interleave(part, 4 // ranks, 2 // ranks) for part in parts]
    folder = write_ranks(tmp_path / "ranks", parts)
    source = MindSporeFile(folder)
    assert source.fused_order == order
    check_complete(source)
    check_same(source, expected)
    (note,) = source.notes
    assert f"row order of MindFormers {order}, detected: order 1.3 explains" in note
    assert settle_options(source, OpenOptions()).fused_order == order
    # What is set is taken, and objected to where the weights say otherwise.
    assert MindSporeFile(folder, fused_order=order).notes == []
    check_same(MindSporeFile(folder, fused_order=order), expected)
    other = "1.3" if order == "1.4" else "1.4"
    (warning,) = MindSporeFile(folder, fused_order=other).notes
    assert warning.startswith(
        f"warning: {folder} is read in the row order of MindFormers {other}, as set, but its weights indicate {order}"
    )


@pytest.mark.parametrize("kind", ["float", "rtn"])
def test_weights_that_do_not_tell_are_refused(tmp_path: Path, kind: str) -> None:
    file = write_ckpt(tmp_path / "x.ckpt", fuse(MAKERS[kind]()))
    with pytest.raises(CheckpointError, match=r"row order cannot be told: order 1\.3 explains .* give --fused-order 1\.3"):
        MindSporeFile(file, CONFIG)
    assert MindSporeFile(file, CONFIG, fused_order="1.3").notes == []
    with pytest.raises(CheckpointError, match=r"--fused-order is '1\.5', but has to be one of auto, 1\.3, 1\.4"):
        OpenOptions(fused_order="1.5")


def test_kinds_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    right, turned = fuse(make("float")), interleave(fuse(make("float")), 4, 2)
    tensors = {name: (turned if "w_qkv" in name else right)[name] for name in right}
    with pytest.raises(CheckpointError, match=r"contradict each other: w_gate_hidden is in MindFormers 1\.3's row order"):
        MindSporeFile(write_ckpt(tmp_path / "x.ckpt", tensors), CONFIG)


def test_separate_tensors_have_no_order(tmp_path: Path) -> None:
    source = MindSporeFile(write_ckpt(tmp_path / "x.ckpt", make_float()), CONFIG)
    assert source.fused_order is None
    assert source.notes == []
    assert settle_options(source, OpenOptions()).fused_order is None


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(200, 900),
    tensors=st.integers(1, 6),
    ratio=st.sampled_from([0.7, 0.85, 1.2, 1.6]),
    spread=st.floats(0.01, 0.15),
    is_later=st.booleans(),
    seed=st.integers(0, 1 << 30),
)
def test_no_difference_of_norms_is_read_the_wrong_way(
    rows: int, tensors: int, ratio: float, spread: float, is_later: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for _ in range(tensors):
        gate, up = torch.exp(spread * torch.randn(2, rows, generator=generator)) * torch.tensor([[1.0], [ratio]])
        norms = torch.stack([gate, up], dim=1).flatten() if is_later else torch.cat([gate, up])
        samples.append(RowNorms(torch.arange(2 * rows), norms, 2 * rows))
    assert weigh_orders(samples).order == ("1.4" if is_later else "1.3")


@settings(max_examples=100, deadline=None)
@given(rows=st.integers(8, 600), tensors=st.integers(1, 8), spread=st.floats(0.01, 1.0), seed=st.integers(0, 1 << 30))
def test_norms_that_do_not_differ_decide_nothing(rows: int, tensors: int, spread: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    samples = [
        RowNorms(torch.arange(2 * rows), torch.exp(spread * torch.randn(2 * rows, generator=generator)), 2 * rows) for _ in range(tensors)
    ]
    assert weigh_orders(samples).order is None


def test_sorted_neurons_do_not_pass_for_the_earlier_order() -> None:
    """Neurons that a pruning sorted by size slope along the rows of order 1.4, where a step between the halves would mean 1.3."""
    size = torch.linspace(2.0, 1.0, 500)
    norms = torch.stack([size, size], dim=1).flatten()
    evidence = weigh_orders([RowNorms(torch.arange(1000), norms, 1000)] * 4)
    assert evidence.explained[0] > 0.5
    assert evidence.order is None


def test_every_rank_reads_its_own_rows_only(tmp_path: Path) -> None:
    """Of alternating rows, too: together the ranks read the file about once."""
    tensors = interleave(fuse(make("float")), 4, 2)
    file = write_ckpt(tmp_path / "x.ckpt", tensors)
    source = MindSporeFile(file, CONFIG, fused_order="1.4")
    specs = plan_weights(build_config(source.config), read_scheme(source.config))
    split = {name: spec for name, spec in specs.items() if ".weight" in name and "norm" not in name}
    expected = sum(source.tensors[name].num_bytes for name in split)
    for world_size in (1, 2, 3):
        total = 0
        for rank in range(world_size):
            reader = FileReader()
            for name, spec in split.items():
                source.read_rows(reader, name, *spec.rows(rank, world_size))
            total += reader.read_bytes
            reader.close()
        # With more ranks than KV heads, some hold a copy of one.
        kv_bytes = sum(source.tensors[name].num_bytes for name in split if "k_proj" in name or "v_proj" in name)
        assert expected <= total <= expected + (kv_bytes if world_size == 3 else 0)


def test_samples_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mindspore_order, "SAMPLE_BYTES", 1 << 20)
    torch.manual_seed(1)
    rows, columns, layers = 20_000, 64, 12
    weight = torch.randn(rows, columns)
    weight[rows // 2 :] *= 1.1
    file = write_ckpt(tmp_path / "x.ckpt", {f"model.layers.{n}.feed_forward.w_gate_hidden.weight": weight for n in range(layers)})
    reader = FileReader()
    header = read_mindspore_header(file, reader)
    before = reader.read_bytes
    parts = {name: [(file, stored)] for name, stored in header.tensors.items()}
    samples = sample_fused(parts, "feed_forward.w_gate_hidden", None, {}, reader)
    assert len(samples) == 8
    assert 1 << 18 < reader.read_bytes - before <= 1 << 20
    assert weigh_orders(samples).order == "1.3"
    reader.close()


class Decrypted:
    """Stands for an encrypted file whose plaintext is the file itself."""

    def __init__(self, path: Path) -> None:
        self._content = path.read_bytes()

    def read_into(self, reader: FileReader, offset_bytes: int, out: torch.Tensor) -> None:
        out.copy_(torch.frombuffer(bytearray(self._content[offset_bytes : offset_bytes + len(out)]), dtype=torch.uint8))


@settings(max_examples=100, deadline=None)
@given(
    data=st.data(),
    is_encrypted=st.booleans(),
    cover=st.sampled_from([1, 50, 8 << 20]),
    take=st.integers(1, 4),
    gap=st.integers(0, 5),
    count=st.integers(1, 30),
    columns=st.sampled_from([1, 3, 40]),
    slice_bytes=st.integers(7, 400),
)
def test_runs_of_rows_are_those_of_indexing(
    tmp_path_factory: pytest.TempPathFactory,
    data: st.DataObject,
    is_encrypted: bool,
    cover: int,
    take: int,
    gap: int,
    count: int,
    columns: int,
    slice_bytes: int,
) -> None:
    first, after = data.draw(st.integers(0, 5)), data.draw(st.integers(0, 5))
    runs = RowRuns(first, take, take + gap, count)
    tensor = torch.arange((runs.stop + after) * columns, dtype=torch.int32).view(-1, columns)
    file = write_ckpt(tmp_path_factory.mktemp("runs") / "x.ckpt", {"x": tensor}, slice_bytes=slice_bytes)
    reader = FileReader()
    stored = read_mindspore_header(file, reader).tensors["x"]
    encrypted = {file: cast(EncryptedFile, Decrypted(file))} if is_encrypted else {}
    block = build_block([(file, stored, runs), (file, stored, RowRuns(0, 1))], encrypted)
    index = [first + run * (take + gap) + row for run in range(count) for row in range(take)] + [0]
    start = data.draw(st.integers(0, len(index)))
    stop = data.draw(st.integers(start, len(index)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mindspore_rows, "_COVER_BYTES", cover)
        assert torch.equal(block.read(reader, start, stop), tensor[index[start:stop]])
    reader.close()
    with pytest.raises(CheckpointError, match="rows of a tensor beside"):
        build_block([(file, stored, RowRuns(first + after + 1, take, take + gap, count))], {})


@pytest.mark.parametrize("order", ["1.3", "1.4"])
def test_real_weights_in_both_orders(shared_dir: Path, order: str) -> None:
    folder = shared_dir / "cases" / "mindformers"
    if not folder.is_dir():
        pytest.skip("no cases/mindformers among the shared data")
    values = read_settings(folder / "fused.yaml").build_model_values()
    source = open_checkpoint(folder / f"fused-{order}-order", OpenOptions(values=values))
    assert isinstance(source, MindSporeFile)
    assert source.fused_order == order
    assert len(source.notes) == 1
    evidence = source.examine_order()
    assert evidence is not None
    assert max(evidence.explained) > 100 * min(evidence.explained)
    truth = open_checkpoint(shared_dir / "data" / "stories260K-hf")
    reader = FileReader()
    for name, info in truth.tensors.items():
        assert torch.equal(read_all(source, name), truth.read_rows(reader, name, 0, info.shape[0]))
    reader.close()
