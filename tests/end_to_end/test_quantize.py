"""`tandem quantize` as users run it: every approach, the same bits for any number of ranks, killed runs, weights of the real tools."""

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from model.checkpoint.cache_scales import CACHE_SCALES_FILE
from model.checkpoint.mindspore_container import MindSporeContainer
from model.spec.packing import unpack_integers
from model.spec.scheme import read_scheme
from model.spec.weights import MINDFORMERS_NAMES
from parallel.file_slices import FileReader

if TYPE_CHECKING:
    from tests.end_to_end.conftest import Checkpoints, Outcome, Running, Tandem

FILES = [
    "SHA256SUMS",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "quantization_report.json",
    "tokenizer.json",
    "tokenizer_config.json",
]
PASSAGE = "The streets of the town are wide, and the tea that is served in its houses is warm. "
QUESTIONS = [("is the tea warm", True), ("are the streets narrow", False), ("is there a town", True), ("do llamas drink tea", False)]


@dataclass(frozen=True)
class Case:
    """One way to quantize."""

    words: str
    """Options of tandem quantize, but for the data; those of BoolQ where they hold {boolq}."""
    name: str
    """What config.json, the report and the stats call it."""
    approach: str
    floats: tuple[str, ...] = ("lm_head",)
    """Linears that stay float."""
    in_ranks: bool = False
    """Whether it goes through rank files, and through three ranks."""


CASES = {
    "rtn-c8": Case("-a rtn-c8", "c8", "rtn-c8", floats=("lm_head", "down_proj", "q_proj"), in_ranks=True),
    "smooth_quant": Case(
        "-q smooth_quant --dataset_type BoolQ --dataset_path {boolq} --output_dir output/smooth_quant_ckpt",
        *("a8w8-static-smooth", "smooth_quant"),
        floats=("lm_head", "down_proj"),
        in_ranks=True,
    ),
    "ptq": Case(
        "-a ptq -w int8 --act-quant-dtype int8 -k int8 --outliers smooth --fold -b lm_head w2 --alpha 0.4",
        *("a8w8-static-c8", "ptq"),
        floats=("lm_head", "down_proj"),
    ),
    "gptq": Case("-a gptq --group-size 16", "a16w4-g16", "gptq", in_ranks=True),
    "awq": Case("-a awq --group-size 16 -k int8 --kvcache-granularity per_token", "a16w4-g16-c8", "awq"),
    "rtn-a16w4": Case("-a rtn-a16w4 --group-size 16 --asymmetric", "a16w4-g16", "rtn-a16w4"),
    "a8w8": Case("-a a8w8", "a8w8-dynamic", "a8w8", in_ranks=True),
    "rtn-a16w8": Case("-a rtn-a16w8", "rtn-a16w8", "rtn-a16w8"),
}
BY_DATA = ("smooth_quant", "ptq", "awq")
"""Cases that ranks have to agree on: sums over samples, rows of all ranks. gptq is held to the same where runs are disturbed."""


@dataclass(frozen=True)
class Quantized:
    """A quantize that has ended well."""

    folder: Path
    stdout: str
    stderr: str

    @property
    def weights(self) -> bytes:
        """The file of the tensors."""
        return (self.folder / "model.safetensors").read_bytes()

    @property
    def report(self) -> dict[str, Any]:
        """What it says about itself."""
        raw: dict[str, Any] = json.loads((self.folder / "quantization_report.json").read_text())
        return raw

    @property
    def config(self) -> dict[str, Any]:
        """Its config.json."""
        raw: dict[str, Any] = json.loads((self.folder / "config.json").read_text())
        return raw


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with boolq.jsonl, ids.npy and long.npy."""
    folder = tmp_path_factory.mktemp("data")
    records = [{"question": question, "title": "Town", "passage": PASSAGE * 3, "answer": answer} for question, answer in QUESTIONS]
    (folder / "boolq.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    random = np.random.default_rng(0)
    np.save(folder / "ids.npy", random.integers(3, 300, (4, 24)))
    np.save(folder / "long.npy", random.integers(3, 300, (32, 512)))
    return folder


@pytest.fixture(scope="session")
def quantize(tandem: "Tandem", checkpoints: "Checkpoints", data: Path) -> Callable[[str, int], Quantized]:
    """Runs a case on so many ranks, in an empty folder and with the default output."""

    def run(name: str, workers: int) -> Quantized:
        words = CASES[name].words.format(boolq=data / "boolq.jsonl").split()
        given = (
            () if "{boolq}" in CASES[name].words or name in ("rtn-a16w8", "rtn-a16w4", "a8w8") else ("-t", "ids", "-s", data / "ids.npy")
        )
        cwd = tandem.new_folder()
        result = tandem.run("quantize", "--checkpoint", checkpoints.float, *words, *given, "--workers", str(workers), cwd=cwd)
        assert result.returncode == 0, result.stderr
        assert {path.name for path in (cwd / "output").iterdir()} == {f"{CASES[name].approach}_ckpt", "log"}
        return Quantized(cwd / "output" / f"{CASES[name].approach}_ckpt", result.stdout, result.stderr)

    return run


@pytest.fixture(scope="session")
def quantized(quantize: Callable[[str, int], Quantized]) -> dict[str, Quantized]:
    """Every case, made by one rank; two at a time."""
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(CASES, pool.map(lambda name: quantize(name, 1), CASES), strict=True))


def _predict(tandem: "Tandem", folder: Path, workers: int, *options: str) -> "Outcome":
    common = ("--threads-per-rank", "1", "--max-new-tokens", "12", "--dtype", "bfloat16", "--logprobs")
    return tandem.predict("--checkpoint", folder, "--workers", str(workers), *common, *options)


@pytest.mark.parametrize("name", CASES)
def test_each_approach_writes_a_whole_folder_and_tells_what_it_cost(name: str, quantized: dict[str, Quantized]) -> None:
    case, made = CASES[name], quantized[name]
    # A cache with stored scales; transformers and vLLM read the weights without them.
    has_scales = read_scheme(made.config).kv_cache == "channel"
    assert sorted(path.name for path in made.folder.iterdir()) == sorted([*FILES, *([CACHE_SCALES_FILE] if has_scales else [])])
    assert read_scheme(made.config).name == case.name
    tensors = load_file(made.folder / "model.safetensors") | (load_file(made.folder / CACHE_SCALES_FILE) if has_scales else {})
    for linear in case.floats:
        found = [tensor for key, tensor in tensors.items() if f"{linear}.weight" in key]
        assert found and all(tensor.dtype == torch.float32 for tensor in found)
    floats = sum(key.endswith("_proj.weight") and tensor.dtype == torch.float32 for key, tensor in tensors.items())
    report = made.report
    assert len(report["linears"]) == 14 - floats
    assert (report["approach"], report["quantization"], report["resumed_layers"]) == (case.approach, case.name, 0)
    assert report["written_bytes"] == sum(tensor.nbytes for tensor in tensors.values()) <= report["source_bytes"] + 2 * 2 * 48 * 2
    assert all(0 < entry["relative_error"] < 0.15 for entry in report["linears"])
    lines = made.stdout.splitlines()
    assert lines[0] == f"{case.approach}: {case.name}, {report['samples']} samples, {report['sample_tokens']} tokens"
    assert lines[-1].startswith("tensors: ")
    assert f"wrote output/{case.approach}_ckpt" in made.stderr


@pytest.mark.parametrize("name", BY_DATA)
def test_two_ranks_write_the_file_that_one_writes(
    name: str, quantize: Callable[[str, int], Quantized], quantized: dict[str, Quantized]
) -> None:
    again = quantize(name, 2)
    assert again.weights == quantized[name].weights
    assert again.config == quantized[name].config
    assert again.report["linears"] == quantized[name].report["linears"]
    assert again.stdout == quantized[name].stdout


@pytest.fixture(scope="session")
def three_ranks(tandem: "Tandem", quantized: dict[str, Quantized]) -> dict[str, Path]:
    """Rank files of the cases that go through them."""

    def reshard(name: str) -> Path:
        target = tandem.new_folder() / "ranks"
        result = tandem.run("reshard", quantized[name].folder, target, "--workers", "3")
        assert result.returncode == 0, result.stderr
        return target

    names = [name for name, case in CASES.items() if case.in_ranks]
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(names, pool.map(reshard, names), strict=True))


@pytest.mark.parametrize("name", [name for name in CASES if name != "rtn-a16w8"])  # that one: test_predict.py
def test_any_number_of_ranks_decodes_the_same_bits(
    name: str, tandem: "Tandem", quantized: dict[str, Quantized], three_ranks: dict[str, Path]
) -> None:
    """Three ranks read rank files, two and one the folder itself."""
    runs: list[tuple[Path, int]] = [
        (quantized[name].folder, 1),
        (quantized[name].folder, 2),
        *([(three_ranks[name], 3)] if name in three_ranks else []),
    ]
    with ThreadPoolExecutor(2) as pool:
        base, *others = pool.map(lambda run: _predict(tandem, *run), runs)
    for other in others:
        assert other.jsonl == base.jsonl
        assert other.stdout == base.stdout
    assert base.stats["quantization"] == CASES[name].name
    assert base.stats["kv_cache_dtype"] == ("int8" if "c8" in CASES[name].name else "bfloat16")


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.in_ranks])
def test_one_file_of_three_rank_files_has_the_tensors_that_these_were_made_of(
    name: str, tandem: "Tandem", quantized: dict[str, Quantized], three_ranks: dict[str, Path]
) -> None:
    target = tandem.new_folder() / "one"
    result = tandem.run("reshard", three_ranks[name], target, "--workers", "1")
    assert result.returncode == 0, result.stderr
    scales = quantized[name].folder / CACHE_SCALES_FILE
    before = load_file(quantized[name].folder / "model.safetensors") | (load_file(scales) if scales.exists() else {})
    (file,) = target.glob("*.safetensors")
    after = load_file(file)
    assert after.keys() == before.keys()
    for key, tensor in before.items():
        assert after[key].dtype == tensor.dtype, key
        assert torch.equal(after[key], tensor), key
    assert read_scheme(json.loads((target / "config.json").read_text())) == read_scheme(quantized[name].config)


def test_an_int8_cache_takes_half_the_bytes_and_can_be_left_out(
    tandem: "Tandem", checkpoints: "Checkpoints", quantized: dict[str, Quantized]
) -> None:
    int8, without = (
        _predict(tandem, quantized["rtn-c8"].folder, 1),
        _predict(tandem, quantized["rtn-c8"].folder, 1, "--kv-cache-dtype", "float"),
    )
    assert (int8.stats["kv_cache_dtype"], without.stats["kv_cache_dtype"]) == ("int8", "bfloat16")
    assert without.stats["kv_cache_bytes_per_token"] == [2 * 2 * 48 * 2]  # keys and values of two layers
    assert int8.stats["kv_cache_bytes_per_token"] == [2 * 2 * 48]
    assert without.jsonl == _predict(tandem, checkpoints.float, 1).jsonl, "the weights are those of the float checkpoint"
    assert int8.jsonl != without.jsonl


def test_the_yaml_of_a_quantized_cache_asks_a_float_checkpoint_for_one(
    tandem: "Tandem", checkpoints: "Checkpoints", tmp_path: Path
) -> None:
    """Without stored scales each token gets its own."""
    config = tmp_path / "c8.yaml"
    section = checkpoints.int8_config.read_text().replace("weight_dtype: 'int8'", "weight_dtype: None")
    config.write_text(section.replace("kvcache_dtype: None", "kvcache_dtype: 'int8'"))
    by_yaml = _predict(tandem, checkpoints.float, 2, "--config", str(config))
    by_option = _predict(tandem, checkpoints.float, 1, "--kv-cache-dtype", "int8")
    assert by_yaml.jsonl == by_option.jsonl
    assert by_yaml.stats["kv_cache_dtype"] == by_option.stats["kv_cache_dtype"] == "int8"


# ---- runs that are disturbed


@pytest.fixture(scope="session")
def undisturbed(tandem: "Tandem", checkpoints: "Checkpoints", data: Path) -> Quantized:
    """gptq on one rank, with samples enough that a layer takes a second."""
    folder = tandem.new_folder() / "made"
    result = tandem.run(*_long_words(checkpoints, data, folder, "1"))
    assert result.returncode == 0, result.stderr
    return Quantized(folder, result.stdout, result.stderr)


def _long_words(checkpoints: "Checkpoints", data: Path, folder: Path, workers: str) -> list[str | Path]:
    given: list[str | Path] = ["-a", "gptq", "--group-size", "16", "-t", "ids", "-s", data / "long.npy", "--workers", workers]
    return ["quantize", "--checkpoint", checkpoints.float, *given, "--output", folder, "--log-dir", folder.parent / "logs"]


def _start_and_wait_for_a_layer(tandem: "Tandem", checkpoints: "Checkpoints", data: Path, folder: Path) -> "Running":
    command: list[str | Path] = [sys.executable, "-m", "launcher", *_long_words(checkpoints, data, folder, "2")]
    running = tandem.start(command)
    first = folder.parent / ".made.quantizing" / "layer_0000.json"
    deadline = time.monotonic() + 120
    while not first.exists():
        assert running.process.poll() is None and time.monotonic() < deadline, running.process.communicate()
        time.sleep(0.01)
    return running


def test_the_same_command_goes_on_where_a_killed_one_stopped(
    tandem: "Tandem", checkpoints: "Checkpoints", data: Path, undisturbed: Quantized
) -> None:
    folder = tandem.new_folder() / "made"
    running = _start_and_wait_for_a_layer(tandem, checkpoints, data, folder)
    running.process.kill()
    assert running.wait_until_gone(20) == []
    assert not folder.exists(), "a killed command leaves no half checkpoint"
    assert (folder.parent / ".made.quantizing" / "layer_0000.json").exists()

    again = tandem.run(*_long_words(checkpoints, data, folder, "2"))
    assert again.returncode == 0, again.stderr
    told = [line for line in again.stderr.splitlines() if "layers are already done; resuming" in line]
    assert told in (["1 of 3 layers are already done; resuming"], ["2 of 3 layers are already done; resuming"])
    made = Quantized(folder, again.stdout, again.stderr)
    assert made.report["resumed_layers"] == int(told[0][0])
    _check_same(made, undisturbed)


def test_a_killed_rank_is_started_again_and_keeps_the_layers_that_are_done(
    tandem: "Tandem", checkpoints: "Checkpoints", data: Path, undisturbed: Quantized
) -> None:
    folder = tandem.new_folder() / "made"
    running = _start_and_wait_for_a_layer(tandem, checkpoints, data, folder)
    os.kill(running.find_ranks()[1], signal.SIGKILL)
    stdout, stderr = running.process.communicate(timeout=120)
    assert running.process.returncode == 0, stderr
    assert "restart 1 of 1: all ranks reload and layers that are done are kept" in stderr
    made = Quantized(folder, stdout, stderr)
    assert made.report["resumed_layers"] in (1, 2)
    _check_same(made, undisturbed)


def _check_same(made: Quantized, undisturbed: Quantized) -> None:
    assert made.weights == undisturbed.weights
    assert made.report["linears"] == undisturbed.report["linears"]
    assert made.stdout == undisturbed.stdout
    assert sorted(path.name for path in made.folder.iterdir()) == FILES
    assert sorted(path.name for path in made.folder.parent.iterdir()) == ["logs", "made"], "the work folder is gone"


# ---- weights that the real tools made

REAL_YAML = """model:
  model_config:
    type: LlamaConfig
    hidden_size: 64
    num_layers: 2
    num_heads: 4
    n_kv_heads: 2
    vocab_size: 96
    intermediate_size: 176
    seq_length: 32
    compute_dtype: "float32"
  arch:
    type: LlamaForCausalLM
"""
REAL_NAMES = {
    "model.tok_embeddings.embedding_weight": "model.embed_tokens.weight",
    "model.norm_out.weight": "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
    **{f"model.layers.{layer}.attention_norm.weight": f"model.layers.{layer}.input_layernorm.weight" for layer in (0, 1)},
    **{f"model.layers.{layer}.ffn_norm.weight": f"model.layers.{layer}.post_attention_layernorm.weight" for layer in (0, 1)},
}
"""Tensors that no approach touches: MindFormers' names to Hugging Face's."""
LINEARS = {
    f"model.layers.{layer}.{theirs}": f"model.layers.{layer}.{ours}" for layer in (0, 1) for ours, theirs in MINDFORMERS_NAMES.items()
}


@pytest.fixture
def golden_stick(shared_dir: Path, tmp_path: Path) -> tuple[Path, Path]:
    """The folder of the real files, and a YAML of their model."""
    config = tmp_path / "tiny.yaml"
    config.write_text(REAL_YAML)
    return shared_dir / "data" / "mindspore_ckpt" / "golden_stick", config


@pytest.mark.parametrize(
    ("words", "truth", "weight", "scale"),
    [
        (("-a", "rtn-a16w8"), "rtn-a16w8_float32", "_handler.weight", "_weight_quantizer.scale"),
        (("-a", "ptq", "-w", "int8", "-b", "lm_head"), "ptq_a16w8_float32", "_layer.weight", "_layer.matmul.t_scale"),
    ],
)
def test_integers_and_scales_are_those_of_the_real_golden_stick(
    tandem: "Tandem", golden_stick: tuple[Path, Path], words: tuple[str, ...], truth: str, weight: str, scale: str
) -> None:
    folder, config = golden_stick
    target = tandem.new_folder() / "made"
    result = tandem.run("quantize", "-c", config, "--checkpoint", folder / "fp_float32.ckpt", *words, "--output", target)
    assert result.returncode == 0, result.stderr
    made = load_file(target / "model.safetensors")
    with np.load(folder / f"{truth}.npz") as real:
        for theirs, ours in LINEARS.items():
            integers, scales = torch.from_numpy(real[f"{theirs}.{weight}"]), torch.from_numpy(real[f"{theirs}.{scale}"])
            assert torch.equal(unpack_integers(made[f"{ours}.weight_packed"], 8, integers.shape[1]), integers), ours
            assert made[f"{ours}.weight_scale"].dtype == scales.dtype
            assert torch.equal(made[f"{ours}.weight_scale"], scales.view(-1, 1)), ours
        for theirs, ours in REAL_NAMES.items():
            assert torch.equal(made[ours], torch.from_numpy(real[theirs])), ours
        if truth.startswith("rtn"):  # the names of other approaches are not written
            tags = read_tags(target / "rank_0" / "rtn-a16w8.ckpt")
            assert set(tags) == set(real.files)
            for tag, tensor in tags.items():
                assert torch.equal(tensor, torch.from_numpy(real[tag])), tag


def read_tags(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a .ckpt under the names in the file."""
    container = MindSporeContainer(path)
    reader = FileReader()
    tags = {name: container.read_rows(reader, name, 0, info.shape[0]) for name, info in container.tensors.items()}
    reader.close()
    return tags


def test_the_next_steps_of_the_document_work_on_the_written_file(tandem: "Tandem", checkpoints: "Checkpoints") -> None:
    """Quantize a .ckpt with Golden Stick's words; copy the result beside the YAML; predict from that folder, on two ranks."""
    folder = tandem.new_folder()
    result = tandem.run("convert", checkpoints.float, folder / "float.ckpt", "--to", "mindspore")
    assert result.returncode == 0, result.stderr
    (folder / "config.json").unlink()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(checkpoints.float / name, folder)
    words = ("-t", "boolq", "-a", "rtn-a16w8")
    result = tandem.run("quantize", "-c", checkpoints.config, "--load_checkpoint", folder / "float.ckpt", *words, "-n", "1", cwd=folder)
    assert result.returncode == 0, result.stderr
    model = folder / "llama_rtn_a16w8_dir"
    model.mkdir()
    shutil.copy(folder / "output" / "rtn-a16w8_ckpt" / "rank_0" / "rtn-a16w8.ckpt", model / "llama_rtn_a16w8.ckpt")
    shutil.copy(checkpoints.int8_config, model)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(checkpoints.float / name, model)
    found = tandem.predict("--checkpoint", model, "--workers", "2", "--max-new-tokens", "12")
    expected = tandem.predict(
        "--checkpoint", checkpoints.int8, "--config", checkpoints.int8_config, "--workers", "2", "--max-new-tokens", "12"
    )
    assert found.stdout == expected.stdout
    assert found.stats["quantization"] == "rtn-a16w8"
    assert (found.logs / "worker_0.log").read_text().endswith(found.stdout), "where users of msrun look for the results"


def test_a_mindspore_file_converts_to_the_tensors_that_mindspore_reads(tandem: "Tandem", golden_stick: tuple[Path, Path]) -> None:
    folder, config = golden_stick
    target = tandem.new_folder() / "made"
    result = tandem.run("convert", folder / "fp_float32.ckpt", target, "-c", config)
    assert result.returncode == 0, result.stderr
    made = load_file(target / "model.safetensors")
    names = REAL_NAMES | {f"{theirs}.weight": f"{ours}.weight" for theirs, ours in LINEARS.items()}
    with np.load(folder / "fp_float32.npz") as real:
        assert sorted(names) == sorted(real.files)
        assert sorted(names.values()) == sorted(made)
        for theirs, ours in names.items():
            assert torch.equal(made[ours], torch.from_numpy(real[theirs])), ours
    sizes = json.loads((target / "config.json").read_text())
    assert (sizes["hidden_size"], sizes["num_key_value_heads"], sizes["vocab_size"]) == (64, 2, 96)
