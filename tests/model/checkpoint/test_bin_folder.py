"""Hugging Face folders of pickles, written as transformers wrote them, read like the same weights in safetensors."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from model.checkpoint.formats import find_format, open_checkpoint
from model.checkpoint.notes import list_notes
from model.checkpoint.verification import check_files
from model.decoder.llama import LlamaForCausalLM
from model.decoder.loading import load_model
from model.planning import Workload, plan_ranks
from model.spec.config import build_config
from model.spec.scheme import Scheme
from parallel.errors import CheckpointError
from parallel.file_slices import FileReader

INDEX = "pytorch_model.bin.index.json"


@pytest.fixture(scope="module", params=["single", "indexed", "parts"])
def folder(request: pytest.FixtureRequest, tiny_llama: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tied tiny model as pickles: the head is stored as another name of the embedding."""
    source, path = tiny_llama("tied"), tmp_path_factory.mktemp(request.param)
    state = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).state_dict()
    shutil.copy(source / "config.json", path)
    torch.save({"lr": 1.0}, path / "training_args.bin")
    if request.param == "single":
        torch.save(state, path / "pytorch_model.bin")
        return path
    places = {name: f"pytorch_model-0000{1 + number % 2}-of-00002.bin" for number, name in enumerate(state)}
    for file in set(places.values()):
        torch.save({name: state[name] for name, place in places.items() if place == file}, path / file)
    if request.param == "indexed":
        (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return path


def test_every_tensor_equals_that_of_safetensors(folder: Path, tiny_llama: Callable[[str], Path]) -> None:
    assert find_format(folder) == "bin"
    source, other, reader = open_checkpoint(folder), open_checkpoint(tiny_llama("tied")), FileReader()
    assert set(source.tensors) == {*other.tensors, "lm_head.weight"}
    for name, info in other.tensors.items():
        rows = info.shape[0]
        assert torch.equal(source.read_rows(reader, name, 1, rows), other.read_rows(reader, name, 1, rows)), name
    assert any("convert them once with tandem convert" in note for note in list_notes(source, build_config(source.config)))
    assert all(check.is_intact and check.recorded_in == "its zip directory" for check in check_files(source))


def test_every_rank_reads_its_rows_and_no_others(folder: Path, gather_ranks: Callable[..., list[Any]]) -> None:
    source = open_checkpoint(folder)
    config = build_config(source.config)

    def load(collectives: Any) -> int:
        model = LlamaForCausalLM(config, Scheme(), collectives, dtype="float32", device=torch.device("cpu"))
        return load_model(model, source)

    plans = plan_ranks(config, Scheme(), 3, Workload(dtype="float32", tokens=8), {n: i.form for n, i in source.tensors.items()})
    assert gather_ranks(3, load) == [plan.file_bytes for plan in plans]


class Harm:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("harm",))


def test_a_pickle_that_wants_to_run_code_is_refused_and_none_is_run(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(folder / "config.json", tmp_path)
    torch.save({"model.norm.weight": torch.ones(2), "x": Harm()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"wants to run code \('.*print'\), which no tensor needs; none was run"):
        open_checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps({"x": Harm()}))
    with pytest.raises(CheckpointError, match=r"is no zip file, as torch\.save has written since 1\.6: save it again"):
        open_checkpoint(tmp_path)
    assert capsys.readouterr().out == ""


def test_a_missing_part_is_named(folder: Path, tmp_path: Path) -> None:
    if not (folder / "pytorch_model-00002-of-00002.bin").is_file():
        return
    shutil.copytree(folder, tmp_path / "m")
    (tmp_path / "m" / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(CheckpointError, match=r"pytorch_model-00002-of-00002\.bin.*copy"):
        open_checkpoint(tmp_path / "m")


def test_an_index_that_names_another_file_is_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "config.json", tmp_path)
    for name in ("../x.bin", "model.safetensors", ".bin"):
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(CheckpointError, match=r"names '.*', which is no bin file of its folder"):
            open_checkpoint(tmp_path)
