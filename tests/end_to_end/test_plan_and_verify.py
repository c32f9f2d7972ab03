"""`tandem plan` against real runs, `tandem verify` against every kind of damage, and what other commands do with damaged input."""

import hashlib
import json
import os
import re
import shutil
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from launcher.cli import main as cli
from launcher.settings.approaches import APPROACHES
from model.kernels.library import find_kernels

if TYPE_CHECKING:
    from tests.end_to_end.conftest import Checkpoints, Outcome, Tandem

LLAMA_70B = {
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
}
PARAMETERS_70B = 68_976_648_192
# What runs a command, and then writes the processor seconds and the memory that it took.
MEASURE = """
import json, pathlib, resource, subprocess, sys
code = subprocess.run(sys.argv[2:]).returncode
used = resource.getrusage(resource.RUSAGE_CHILDREN)
pathlib.Path(sys.argv[1]).write_text(json.dumps([used.ru_utime, used.ru_maxrss * 1024]))
sys.exit(code)
"""
LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "TORCHELASTIC_", "MS_", "SLURM_", "OMPI_", "PMI_")
DIMENSIONS = ("heads", "kv_heads", "hidden_rows", "intermediate_rows", "vocab_rows")
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


@dataclass(frozen=True)
class Ended:
    """A command that has ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The one object on standard output. Fails when anything else stands there."""
        assert self.out.count("\n") == 1 and self.out.endswith("\n"), self.out
        found: dict[str, Any] = json.loads(self.out)
        return found


Tool = Callable[..., Ended]


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Tool:
    """The command line in this process, which has PyTorch imported already: `tool(ARGUMENTS)`."""

    # What a launcher may have set must not decide a test.
    for name in [name for name in os.environ if name.startswith(LAUNCHERS)]:
        monkeypatch.delenv(name)

    def run(*arguments: str | Path) -> Ended:
        monkeypatch.setattr(sys, "argv", ["tandem", *map(str, arguments)])
        capfd.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as ended:
            code = int(ended.code or 0)
        return Ended(code, *capfd.readouterr())

    return run


@pytest.fixture(scope="session")
def config_70b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config.json."""
    path = tmp_path_factory.mktemp("70b") / "config.json"
    path.write_text(json.dumps(LLAMA_70B))
    return path


def run_plan(tandem: "Tandem", *arguments: str | Path) -> dict[str, Any]:
    result = tandem.run("plan", *arguments, "--json")
    assert (result.returncode, result.stderr) == (0, "")
    return Ended(result.returncode, result.stdout, result.stderr).json


# tandem plan


def test_a_plan_of_70b_takes_no_two_seconds_and_little_memory(tandem: "Tandem", config_70b: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "launcher", "plan", "--model-config", config_70b, "--workers", "8", "--quantization", "rtn-a16w8"]
    result = tandem.run_command([sys.executable, "-c", MEASURE, tmp_path / "used.json", *command, "--json"], cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    seconds, peak_bytes = json.loads((tmp_path / "used.json").read_text())
    assert seconds < 2 and peak_bytes < 300e6
    found = Ended(0, result.stdout, "").json
    assert (found["workers"], found["quantization"], found["dtype"]) == (8, "rtn-a16w8", "float16")
    assert [rank["kv_heads"] for rank in found["ranks"]] == [[rank, rank + 1] for rank in range(8)]
    assert found["valid_workers"] == list(range(1, 65))
    assert found["balance"]["8"] == 1 and found["balance"]["3"] < 1
    # An eighth of a byte a weight, and of two for the embedding and the head, with scales on top.
    expected = (PARAMETERS_70B + 2 * 32000 * 8192) / 8
    assert all(expected < rank["weight_bytes"] < 1.01 * expected for rank in found["ranks"])
    assert [path.name for path in tmp_path.iterdir()] == ["used.json"], "a plan writes nothing"


def test_a_plan_follows_model_config_dtype_batch_and_bandwidth(tandem: "Tandem", config_70b: Path) -> None:
    found = run_plan(
        tandem,
        "--model-config",
        config_70b,
        "-n",
        "4",
        "--dtype",
        "bfloat16",
        "--batch-size",
        "2",
        "--tokens",
        "1000",
        "--bandwidth",
        "500",
    )
    assert (found["workers"], found["quantization"], found["dtype"], found["kv_cache"]) == (4, "none", "bfloat16", "bfloat16")
    norms = (2 * 80 + 1) * 8192
    assert found["file_bytes"] == 2 * (PARAMETERS_70B + 3 * norms)
    assert all(rank["kv_cache_bytes"] == 2 * 1008 * 80 * 2 * 2 * 128 * 2 for rank in found["ranks"])
    slowest = max(rank["streamed_bytes"] + rank["kv_cache_bytes"] for rank in found["ranks"])
    assert found["tokens_per_second"] == pytest.approx(2 * 500e9 / slowest)
    assert found["peak_bytes"] == sum(rank["peak_bytes"] for rank in found["ranks"])


def test_a_plan_in_words_shows_a_row_for_each_rank_and_what_is_valid(tandem: "Tandem", config_70b: Path) -> None:
    result = tandem.run("plan", "--model-config", config_70b, "--workers", "3", "--bandwidth", "800")
    assert (result.returncode, result.stderr) == (0, "")
    for words in ("3 ranks, quantization none, compute float16", "0-23", "24-47", "48-63", "valid: 1 to 64 ranks", "65 ranks are too many"):
        assert words in result.stdout, words
    assert re.search(r"at most \d+\.\d tokens/s at 800 GB/s a rank, at 4096 tokens of context", result.stdout)
    assert re.search(r"even within 5 %: 1-\d+(, \d+(-\d+)?)*\n", result.stdout)


def test_a_plan_takes_sizes_ranks_and_quantization_from_the_yaml(tandem: "Tandem", checkpoints: "Checkpoints") -> None:
    found = run_plan(tandem, "--config", checkpoints.int8_config)
    assert (found["workers"], found["quantization"], found["dtype"]) == (3, "rtn-a16w8", "float32")
    assert [rank["heads"] for rank in found["ranks"]] == [[0, 3], [3, 6], [6, 9]]
    assert run_plan(tandem, "--config", checkpoints.config, "--workers", "2")["quantization"] == "none"


SHAPES = {
    "rtn-a16w8": "rtn-a16w8",
    "rtn-c8": "c8",
    "smooth_quant": "a8w8-static-smooth",
    "gptq": "a16w4-g128",
    "awq": "a16w4-g128",
    "rtn-a16w4": "a16w4-g128",
    "a8w8": "a8w8-dynamic",
}
"""Approach: what it stores."""


@pytest.mark.parametrize("approach", [*APPROACHES, "none"])
def test_every_approach_can_be_planned(tool: Tool, config_70b: Path, approach: str) -> None:
    found = tool("plan", "--model-config", config_70b, "-n", "8", "--quantization", approach, "--json")
    if approach == "ptq":  # its own words say what it makes, and a plan has none of them
        assert found.code == 2 and found.out == ""
        assert "--quantization ptq does not determine the result" in found.err and "quantization_config (-c)" in found.err
        return
    assert (found.code, found.err) == (0, "")
    assert found.json["quantization"] == ("none" if approach == "none" else SHAPES[approach])
    weights, reads = (sum(rank[f"{name}_bytes"] for rank in found.json["ranks"]) for name in ("weight", "file"))
    if approach in ("none", "rtn-c8"):
        assert weights / PARAMETERS_70B == pytest.approx(2, rel=0.01)
    else:
        # smooth_quant leaves w2, 28672 x 8192 in each layer, in float16.
        floats = 80 * 28672 * 8192 if approach == "smooth_quant" else 0
        packed = "w4" in found.json["quantization"] and find_kernels() is not None
        assert weights / (PARAMETERS_70B + floats) == pytest.approx(0.55 if packed else 1, rel=0.05)
    if "w4" in found.json["quantization"]:
        assert reads < 0.55 * PARAMETERS_70B
    assert found.json["kv_cache"] == ("channel" if approach == "rtn-c8" else "float16")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--workers", "65"), r"65 ranks are too many: the model has 64 query heads; 1 to 64 all work"),
        (("--workers", "0"), r"--workers is 0.*at least 1"),
        (("--quantization", "int3"), r"'int3' is unknown; there are rtn-a16w8, .*a8w8"),
        (("--dtype", "float8"), r"--dtype is 'float8', but has to be one of float32, bfloat16, float16"),
        (("--bandwidth", "-1"), r"--bandwidth is -1.*has to be above 0"),
        (("--batch-size", "0"), r"--batch-size is 0.*has to be above 0"),
        (("--tokens", "-5"), r"--tokens is -5.*has to be above 0"),
    ],
)
def test_a_plan_that_cannot_be_is_refused_with_the_reason(tool: Tool, config_70b: Path, arguments: tuple[str, ...], words: str) -> None:
    found = tool("plan", "--model-config", config_70b, *arguments, "--json")
    assert (found.code, found.out) == (2, "")
    assert re.fullmatch(rf"tandem: .*{words}.*\n", found.err), found.err


def test_a_plan_of_nothing_says_what_to_give(tandem: "Tandem") -> None:
    result = tandem.run("plan", "--workers", "2")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "tandem: no model: give --config, --model-config or --checkpoint\n"


@pytest.mark.parametrize("workers", ["1", "3", "64"])
def test_the_picture_is_xml_with_a_bar_for_each_rank_and_dimension(tool: Tool, config_70b: Path, tmp_path: Path, workers: str) -> None:
    path, ranks = tmp_path / "plan.svg", int(workers)
    found = tool("plan", "--model-config", config_70b, "-n", workers, "--svg", path, "--json")
    assert found.code == 0 and len(found.json["ranks"]) == ranks
    assert found.err == f"wrote {path}\n"
    space = "{http://www.w3.org/2000/svg}"
    root = ElementTree.parse(path).getroot()
    assert root.tag == f"{space}svg"
    bars = [one for one in root.iter(f"{space}rect") if one.find(f"{space}title") is not None]
    assert len(bars) == ranks * len(DIMENSIONS) == len(list(root.iter(f"{space}rect"))) - 1  # and the ground
    titles = iter(bars)
    width, height = float(root.get("width", 0)), float(root.get("height", 0))
    for dimension in DIMENSIONS:
        for rank in found.json["ranks"]:
            bar = next(titles)
            start, stop = rank[dimension]
            assert re.fullmatch(rf"rank {rank['rank']}: .* {start} to {stop}", bar.findtext(f"{space}title", "")), dimension
            x, wide = float(bar.get("x", -1)), float(bar.get("width", -1))
            assert 0 <= x < x + wide <= width and 0 <= float(bar.get("y", -1)) < height


RUNS = {"float": 1, "int8": 2, "float_three_ranks": 3}
"""Form of the tiny checkpoint: number of ranks."""


@pytest.fixture
def run_and_plan(tandem: "Tandem", checkpoints: "Checkpoints", tool: Tool) -> Callable[[str], tuple["Outcome", dict[str, Any]]]:
    """A function that runs a form of the tiny checkpoint, and plans the same."""

    def run(form: str) -> tuple["Outcome", dict[str, Any]]:
        arguments = ("--checkpoint", getattr(checkpoints, form), "--workers", str(RUNS[form]), "--threads-per-rank", "1")
        # Fresh: a fork of the command host would have its modules in memory too.
        outcome = tandem.predict(*arguments, "--verify", "--prompt", "I love Beijing, because " * 20, "--max-new-tokens", "8", fresh=True)
        planned = tool("plan", *arguments, "--tokens", "256", "--json")
        assert (planned.code, planned.err) == (0, "")
        return outcome, planned.json

    return run


@pytest.mark.parametrize("form", RUNS)
def test_a_real_run_keeps_and_reads_the_bytes_of_its_plan(
    run_and_plan: Callable[[str], tuple["Outcome", dict[str, Any]]], form: str
) -> None:
    outcome, plan = run_and_plan(form)
    stats = outcome.stats
    assert stats["weight_bytes"] == [rank["weight_bytes"] for rank in plan["ranks"]]
    assert stats["read_bytes"] == [rank["file_bytes"] for rank in plan["ranks"]]
    assert [count * 256 for count in stats["kv_cache_bytes_per_token"]] == [rank["kv_cache_bytes"] for rank in plan["ranks"]]
    assert (stats["quantization"], stats["dtype"], stats["world_size"]) == (plan["quantization"], plan["dtype"], plan["workers"])


@pytest.mark.skipif(
    not torch.__version__.startswith("2.13.") or torch.version.cuda is not None,
    reason="the size of a process without weights was measured with PyTorch 2.13 for processors",
)
@pytest.mark.parametrize("form", RUNS)
def test_a_real_run_needs_the_memory_of_its_plan_within_five_percent(
    run_and_plan: Callable[[str], tuple["Outcome", dict[str, Any]]], form: str
) -> None:
    outcome, plan = run_and_plan(form)
    measured = outcome.stats["peak_rss_bytes"]
    assert [rank["peak_bytes"] for rank in plan["ranks"]] == pytest.approx(measured, rel=0.05)


# tandem verify


def flip(file: Path, offset: int) -> None:
    with file.open("r+b") as opened:
        opened.seek(offset)
        (byte,) = opened.read(1)
        opened.seek(offset)
        opened.write(bytes([byte ^ 1]))


def between_samples(file: Path) -> int:
    """A place in the data that only a checksum of the whole file covers."""
    size = file.stat().st_size
    assert size > 300_000
    return (size - 4096) * 7 // 15 + 10_000


def copy(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target)
    return target


@pytest.mark.parametrize(
    ("form", "words", "recorded_in"),
    [
        ("float", "hf", None),
        ("int8", "compressed-tensors", "SHA256SUMS"),
        ("int8_two_ranks", "ranks", "layout.json"),
        ("float_three_ranks", "ranks", "layout.json"),
    ],
)
@pytest.mark.parametrize("deep", [(), ("--deep",)])
def test_a_whole_checkpoint_is_ok(
    tool: Tool, checkpoints: "Checkpoints", form: str, words: str, recorded_in: str | None, deep: tuple[str, ...]
) -> None:
    folder = getattr(checkpoints, form)
    found = tool("verify", folder, "--json", *deep)
    assert found.code == 0
    result = found.json
    assert (result["ok"], result["problems"], result["format"], result["deep"]) == (True, [], words, bool(deep))
    assert [(file["recorded_in"], file["ok"]) for file in result["files"]] == [(recorded_in, True)] * len(result["files"])
    for file in result["files"]:
        content = (folder / file["name"]).read_bytes()
        assert (file["size_bytes"], file["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
    assert len(result["tensors"]) == result["num_tensors"] > 20
    lines = tool("verify", folder, *deep)
    assert lines.code == 0 and lines.out.endswith("\nok\n")
    assert all(f"{file['sha256']}  {file['name']}" in lines.out for file in result["files"])
    assert ("no checksum recorded" if recorded_in is None else f"as {recorded_in} says") in lines.out


def test_verify_as_users_run_it_ends_with_code_2_and_one_object(tandem: "Tandem", checkpoints: "Checkpoints", tmp_path: Path) -> None:
    damaged = copy(checkpoints.int8, tmp_path / "int8")
    flip(damaged / "model.safetensors", (damaged / "model.safetensors").stat().st_size - 5000)
    bad = tandem.run("verify", damaged, "--json")
    assert bad.returncode == 2 and "Traceback" not in bad.stderr
    assert Ended(2, bad.stdout, bad.stderr).json["ok"] is False
    assert bad.stderr.splitlines()[-1].startswith("tandem: ")


def _flipped_rank_file(good: "Checkpoints", folder: Path) -> Path:
    target = copy(good.float_three_ranks, folder)
    flip(target / "rank_01_of_03.safetensors", between_samples(target / "rank_01_of_03.safetensors"))
    return target


def _flipped_folder(good: "Checkpoints", folder: Path) -> Path:
    target = copy(good.int8, folder)
    flip(target / "model.safetensors", (target / "model.safetensors").stat().st_size // 2)
    return target


def _flipped_downloaded_folder(good: "Checkpoints", folder: Path) -> Path:
    target = copy(good.float, folder)
    file = target / "model.safetensors"
    (target / "SHA256SUMS").write_text(f"{hashlib.sha256(file.read_bytes()).hexdigest()} *./model.safetensors\n")
    flip(file, file.stat().st_size - 1)
    return target


def _missing_rank_file(good: "Checkpoints", folder: Path) -> Path:
    target = copy(good.float_three_ranks, folder)
    (target / "rank_02_of_03.safetensors").unlink()
    return target


def _swapped_rank_files(good: "Checkpoints", folder: Path) -> Path:
    target = copy(good.float_three_ranks, folder)
    first, second = (target / f"rank_0{rank}_of_03.safetensors" for rank in (0, 1))
    first.rename(target / "aside")
    second.rename(first)
    (target / "aside").rename(second)
    return target


def _missing_tensor(good: "Checkpoints", folder: Path) -> Path:
    return _change(good.float, folder, lambda tensors: tensors.pop(Q_PROJ))


def _not_a_number(good: "Checkpoints", folder: Path) -> Path:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[Q_PROJ][3, 4] = torch.nan
        tensors[Q_PROJ][5, :2] = -torch.inf

    return _change(good.float, folder, change)


def _change(good: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    target = copy(good, folder)
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


DAMAGES: dict[str, tuple[Callable[["Checkpoints", Path], Path], tuple[str, ...], str]] = {
    # how it comes about, further arguments, words
    "a byte of a rank file": (
        _flipped_rank_file,
        (),
        r"rank_01_of_03\.safetensors is damaged: its checksum is [0-9a-f]{64}, but layout\.json says [0-9a-f]{64}: copy it again",
    ),
    "a byte of a folder that tandem wrote": (_flipped_folder, (), r"model\.safetensors is damaged: .*SHA256SUMS says [0-9a-f]{64}"),
    "a byte of a folder with sha256sum's file": (_flipped_downloaded_folder, (), r"model\.safetensors is damaged: .*SHA256SUMS says"),
    "a missing rank file": (_missing_rank_file, (), r"rank_02_of_03\.safetensors does not exist"),
    "swapped rank files": (_swapped_rank_files, (), r"rank_0[01]_of_03\.safetensors"),
    "a missing tensor": (_missing_tensor, (), rf"1 missing: {re.escape(Q_PROJ)}"),
    "values that are no numbers": (_not_a_number, ("--deep",), rf"{re.escape(Q_PROJ)} holds 1 NaN and 2 infinite values"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_ends_with_code_2_and_is_named(tool: Tool, checkpoints: "Checkpoints", tmp_path: Path, damage: str) -> None:
    make, arguments, words = DAMAGES[damage]
    folder = make(checkpoints, tmp_path / "damaged")
    found = tool("verify", folder, "--json", *arguments)
    assert found.code == 2 and not found.json["ok"]
    (problem,) = found.json["problems"]
    assert re.search(words, problem), problem
    assert f"tandem: {folder} has 1 problem, the first: {problem}\n" in found.err
    lines = tool("verify", folder, *arguments)
    assert lines.code == 2 and lines.out.endswith("\nnot ok\n" if "\n" in lines.out.strip() else "not ok\n")
    assert f"problem: {problem}\n" in lines.out
    assert lines.err.endswith(f"tandem: {folder} has 1 problem\n")


def test_what_is_no_number_is_looked_for_only_when_asked(tool: Tool, checkpoints: "Checkpoints", tmp_path: Path) -> None:
    assert tool("verify", _not_a_number(checkpoints, tmp_path / "nan")).code == 0


def test_a_rank_file_of_another_model_of_the_same_shapes_is_found(tool: Tool, checkpoints: "Checkpoints", tmp_path: Path) -> None:
    other = _change(checkpoints.float, tmp_path / "other", lambda tensors: tensors.update({Q_PROJ: tensors[Q_PROJ] * 2}))
    assert tool("reshard", other, tmp_path / "other-3", "--workers", "3").code == 0
    target = copy(checkpoints.float_three_ranks, tmp_path / "mixed")
    shutil.copy(tmp_path / "other-3" / "rank_01_of_03.safetensors", target)
    found = tool("verify", target, "--json")
    assert found.code == 2
    assert re.search(r"rank_01_of_03\.safetensors is (damaged|not the file that layout\.json was written for)", found.json["problems"][0])


def test_every_rank_file_that_is_damaged_is_named(tool: Tool, checkpoints: "Checkpoints", tmp_path: Path) -> None:
    target = _flipped_rank_file(checkpoints, tmp_path / "damaged")
    flip(target / "rank_02_of_03.safetensors", between_samples(target / "rank_02_of_03.safetensors"))
    found = tool("verify", target, "--json")
    assert found.code == 2 and "has 2 problems" in found.err
    assert [file["ok"] for file in found.json["files"]] == [True, False, False]
    assert [problem.split()[0] for problem in found.json["problems"]] == ["rank_01_of_03.safetensors", "rank_02_of_03.safetensors"]


def test_checksums_of_tensors_are_the_same_in_a_folder_and_in_its_rank_files(
    tool: Tool, checkpoints: "Checkpoints", tmp_path: Path
) -> None:
    def read(folder: Path) -> dict[str, Any]:
        found = tool("verify", folder, "--json")
        assert found.code == 0, found.err
        return {tensor["name"]: tensor for tensor in found.json["tensors"]}

    stored = load_file(checkpoints.float / "model.safetensors")
    for source in (checkpoints.float, checkpoints.int8):
        expected = read(source)
        if source == checkpoints.float:
            assert {name: tensor["sha256"] for name, tensor in expected.items()} == {
                name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for name, tensor in stored.items()
            }
        for workers in ("2", "3", "8"):
            target = tmp_path / f"{source.name}-{workers}"
            assert tool("reshard", source, target, "--workers", workers).code == 0
            assert read(target) == expected, workers


# other commands and damaged input


def test_predict_verify_refuses_a_damaged_file_before_anything_starts(tandem: "Tandem", checkpoints: "Checkpoints", tmp_path: Path) -> None:
    damaged, cwd = _flipped_rank_file(checkpoints, tmp_path / "damaged"), tmp_path / "cwd"
    cwd.mkdir()
    result = tandem.run("predict", "--checkpoint", damaged, "--workers", "2", "--verify", "--max-new-tokens", "1", "--prompt", "x", cwd=cwd)
    assert (result.returncode, result.stdout) == (2, "")
    assert re.search(r"tandem: rank_01_of_03\.safetensors is damaged: .*layout\.json says", result.stderr.splitlines()[-1])
    assert list(cwd.iterdir()) == [], "no log folder: no rank was started"


def test_predict_verify_warns_where_nothing_is_recorded_and_goes_on(
    run_and_plan: Callable[[str], tuple["Outcome", dict[str, Any]]], checkpoints: "Checkpoints"
) -> None:
    warned, silent = run_and_plan("float")[0], run_and_plan("int8")[0]
    assert f"warning: no checksums are recorded for {checkpoints.float}: only headers and sizes were checked\n" in warned.stderr
    assert "no checksums" not in silent.stderr and "verifying: " in silent.stderr
    assert len(warned.records) == len(silent.records) == 1


@pytest.mark.parametrize("command", ["reshard", "convert", "convert to mindspore"])
@pytest.mark.parametrize("make", [_flipped_rank_file, _flipped_folder])
def test_a_damaged_checkpoint_is_written_again_only_when_asked(
    tool: Tool, checkpoints: "Checkpoints", tmp_path: Path, command: str, make: Callable[["Checkpoints", Path], Path]
) -> None:
    damaged, target = make(checkpoints, tmp_path / "damaged"), tmp_path / "out"
    words = {"reshard": ("--workers", "2"), "convert": (), "convert to mindspore": ("--to", "mindspore")}[command]
    found = tool(command.split()[0], damaged, target, *words)
    assert (found.code, found.out) == (2, "")
    assert re.search(r"tandem: .* is damaged: its checksum is .*: copy it again\n$", found.err)
    assert [path.name for path in tmp_path.iterdir()] == ["damaged"]
    forced = tool(command.split()[0], damaged, target, *words, "--no-verify")
    assert forced.code == 0, forced.err
    assert f"wrote {target}: " in forced.err and target.is_dir()


def test_a_wrong_word_after_from_lists_the_words(tool: Tool, checkpoints: "Checkpoints", tmp_path: Path) -> None:
    listed = "ranks, modelslim, gptq, awq, auto-round, fp8, compressed-tensors, hf, bin, meta, gguf, mindspore"
    words = f"--from is 'safetensors', but has to be one of {listed}"
    found = tool("convert", checkpoints.float, tmp_path / "out", "--from", "safetensors")
    assert (found.code, found.out, found.err) == (2, "", f"tandem: {words}\n")
    assert list(tmp_path.iterdir()) == []
    verified = tool("verify", checkpoints.float, "--from", "safetensors", "--json")
    assert (verified.code, verified.out, verified.err) == (2, "", f"tandem: {words}\n")


def test_a_file_inside_a_checkpoint_is_answered_with_its_folder(tool: Tool, checkpoints: "Checkpoints", tmp_path: Path) -> None:
    for file in (checkpoints.float / "model.safetensors", checkpoints.float_three_ranks / "rank_00_of_03.safetensors"):
        found = tool("reshard", file, tmp_path / "out", "--workers", "2")
        assert (found.code, found.err) == (2, f"tandem: {file} is a part of a checkpoint: give its folder {file.parent}\n")
        verified = tool("verify", file, "--json")
        assert verified.code == 2 and f"give its folder {file.parent}" in verified.json["problems"][0]


def _write_gguf(path: Path) -> Path:
    """A tiny Llama of one layer in float32, as llama.cpp names it."""
    import gguf
    import numpy as np

    hidden, intermediate, vocab = 64, 96, 40
    writer = gguf.GGUFWriter(path, "llama")
    for add, value in (
        (writer.add_context_length, 128),
        (writer.add_embedding_length, hidden),
        (writer.add_block_count, 1),
        (writer.add_feed_forward_length, intermediate),
        (writer.add_head_count, 4),
        (writer.add_head_count_kv, 2),
    ):
        add(value)
    writer.add_layer_norm_rms_eps(1e-5)
    shapes = {"token_embd": (vocab, hidden), "output": (vocab, hidden), "output_norm": (hidden,)}
    layer = {"attn_norm": (hidden,), "ffn_norm": (hidden,), "attn_q": (hidden, hidden), "attn_k": (32, hidden), "attn_v": (32, hidden)}
    layer |= {"attn_output": (hidden, hidden), "ffn_gate": (intermediate, hidden), "ffn_up": (intermediate, hidden)}
    layer |= {"ffn_down": (hidden, intermediate)}
    random = np.random.default_rng(1)
    for name, shape in {**shapes, **{f"blk.0.{name}": shape for name, shape in layer.items()}}.items():
        writer.add_tensor(f"{name}.weight", random.standard_normal(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("name", ["model.gguf", "weights.bin", "model.ckpt", "noname"])
def test_a_gguf_file_is_recognised_under_any_name(tool: Tool, tmp_path: Path, name: str) -> None:
    file = _write_gguf(tmp_path / name)
    found = tool("verify", file, "--json")
    assert (found.code, found.json["ok"], found.json["format"]) == (0, True, "gguf"), found.err
    assert [one["name"] for one in found.json["files"]] == [name]
