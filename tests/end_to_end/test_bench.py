"""`tandem bench` as users run it: the object that it prints, the lines, the trace, and what it refuses."""

import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from launcher.commands.bench import RESULT_NAMES
from model.kernels.library import find_kernels

if TYPE_CHECKING:
    from tests.end_to_end.conftest import Checkpoints, Tandem

VALUES = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 96,
    "dtype": "bfloat16",
}
QUICK = ("--rounds", "2", "--new-tokens", "5", "--threads-per-rank", "1")
EMBEDDING_BYTES = 300 * 64 * 2
PROJECT_ROOT = Path(__file__).resolve().parent.parent.parent
WITHOUT_KERNELS = """
import sys

if "launcher.supervision" in " ".join(sys.orig_argv):
    import model.kernels.library

    model.kernels.library._disabled = True
"""
"""Executed by every process at its start: ranks have no kernels of their own."""


@pytest.fixture(scope="module")
def shape(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config.json of a tiny model."""
    path = tmp_path_factory.mktemp("shape") / "tiny" / "config.json"
    path.parent.mkdir()
    path.write_text(json.dumps(VALUES))
    return path


def _measure(tandem: "Tandem", *options: str | Path) -> tuple[dict[str, Any], str]:
    """The object on standard output, which holds nothing else, and standard error."""
    result = tandem.run("bench", *options, *QUICK, "--json", "--log-dir", tandem.new_folder() / "logs")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("\n") == 1
    measured: dict[str, Any] = json.loads(result.stdout)
    assert tuple(measured) == RESULT_NAMES
    return measured, result.stderr


def _check(measured: dict[str, Any], world_size: int) -> None:
    """What holds of every measurement."""
    assert (measured["bench"], measured["world_size"], measured["threads_per_rank"]) == ("tandem", world_size, 1)
    assert measured["rounds"] == 2 and measured["new_tokens"] == 5 and measured["cores"] >= 1 and measured["machine"]
    for name in ("weight_bytes", "read_bytes", "peak_rss_bytes"):
        assert len(measured[name]) == world_size
    assert min(measured["peak_rss_bytes"]) > max(measured["weight_bytes"])
    for name in ("time_to_first_token_seconds", "prefill_tokens_per_second", "gather_seconds", "memory_bandwidth_bytes_per_second"):
        assert measured[name] > 0
    assert measured["start_to_first_token_seconds"] > measured["load_seconds"] > 0
    for one in measured["decode"]:
        assert 0 < one["tokens_per_second_min"] <= one["tokens_per_second"] <= one["tokens_per_second_max"]
        assert one["bytes_per_second"] == pytest.approx(measured["decode_bytes_per_step"] * one["tokens_per_second"] / one["batch_size"])
        assert one["bandwidth_share"] == pytest.approx(one["bytes_per_second"] / one["memory_bytes_per_second"])


def test_random_weights_on_one_rank(tandem: "Tandem", shape: Path) -> None:
    measured, _ = _measure(tandem, "--model-config", shape, "--random-weights", "--num-layers", "2", "--quantization", "rtn-a16w4")
    _check(measured, 1)
    assert (measured["model"], measured["num_layers"], measured["quantization"]) == ("tiny", 2, "a16w4-g64")
    assert (measured["dtype"], measured["collectives"], measured["read_bytes"]) == ("bfloat16", "identity", [0])
    assert measured["prompt_tokens"] == 95, "the context is shorter than the default"
    assert [one["batch_size"] for one in measured["decode"]] == [1, 8]
    assert sum(measured["weight_bytes"]) - measured["decode_bytes_per_step"] >= EMBEDDING_BYTES


def test_a_profile_of_two_ranks(tandem: "Tandem", shape: Path) -> None:
    path = tandem.new_folder() / "new" / "trace.json"
    began = time.monotonic()
    words = ("--model-config", shape, "--random-weights", "--workers", "2", "--batch-size", "3", "--profile", path)
    measured, stderr = _measure(tandem, *words)
    ended = time.monotonic()
    _check(measured, 2)
    assert (measured["num_layers"], measured["quantization"]) == (3, "rtn-a16w8")
    assert [one["batch_size"] for one in measured["decode"]] == [3]
    assert "by operation" in stderr and "qkv_proj" in stderr and "layer 2" in stderr

    events = json.loads(path.read_text())["traceEvents"]
    assert [path.name] == [entry.name for entry in path.parent.iterdir()]
    assert {(e["pid"], e["args"]["name"]) for e in events if e["name"] == "process_name"} == {(0, "rank 0"), (1, "rank 1")}
    spans = [e for e in events if e["ph"] == "X"]
    assert all(began < e["ts"] / 1e6 <= (e["ts"] + e["dur"]) / 1e6 < ended for e in spans)
    for rank in (0, 1):
        mine = [e for e in spans if e["pid"] == rank]
        steps = [e for e in mine if e["name"] in ("prefill", "decode")]
        gathers = [e for e in mine if e["name"] == "gather_columns"]
        assert len(steps) == 9
        assert len(gathers) >= len(steps) * (VALUES["num_hidden_layers"] + 1)  # type: ignore[operator]
        inside = [any(s["ts"] <= g["ts"] and g["ts"] + g["dur"] <= s["ts"] + s["dur"] for s in steps) for g in gathers]
        assert all(inside)
        assert all(0 <= g["args"]["waiting_us"] <= g["dur"] for g in gathers)


def test_a_checkpoint_and_lines_for_people(tandem: "Tandem", checkpoints: "Checkpoints") -> None:
    words = ("--checkpoint", checkpoints.int8, "--config", checkpoints.int8_config, "--workers", "2", "--num-layers", "1")
    measured, _ = _measure(tandem, *words)
    _check(measured, 2)
    assert (measured["model"], measured["num_layers"], measured["dtype"]) == ("int8", 1, "float32")
    assert min(measured["read_bytes"]) > 0
    result = tandem.run("bench", *words, *QUICK, "--batch-size", "1", "--log-dir", tandem.new_folder() / "logs")
    assert result.returncode == 0, result.stderr
    assert re.search(r"^memory +[\d.]+ GB/s", result.stdout, re.MULTILINE)
    assert re.search(r"^decode +[\d.]+ tokens/s, batch 1 \(", result.stdout, re.MULTILINE)


def test_what_guesses_gain_on_two_ranks(tandem: "Tandem", checkpoints: "Checkpoints") -> None:
    words = ("--checkpoint", checkpoints.int8, "--workers", "2", "--batch-size", "1", "--speculate")
    measured, stderr = _measure(tandem, *words)
    _check(measured, 2)
    if find_kernels() is None:
        assert measured["speculation"] is None and "warning: --speculate has no effect" in stderr
        return
    assert [row["prompt"] for row in measured["speculation"]] == ["copy", "free"]
    for row in measured["speculation"]:
        assert row["identical"] is True
        assert row["gain"] == pytest.approx(row["tokens_per_second"] / row["tokens_per_second_plain"]) and row["gain"] > 0
        assert row["accepted_share"] is None or 0 <= row["accepted_share"] <= 1
    result = tandem.run("bench", *words, *QUICK, "--log-dir", tandem.new_folder() / "logs")
    assert result.returncode == 0, result.stderr
    line = re.compile(r"^speculate +[\d.]+ tokens/s, (\w+) prompt, batch 1: [\d.]+ times the [\d.]+ without; ", re.MULTILINE)
    assert line.findall(result.stdout) == ["copy", "free"]


def test_where_the_engine_does_not_guess_a_warning_says_so(tandem: "Tandem", checkpoints: "Checkpoints") -> None:
    folder = tandem.new_folder()
    (folder / "sitecustomize.py").write_text(WITHOUT_KERNELS)
    words = ("--checkpoint", checkpoints.int8, "--batch-size", "1", "--speculate", *QUICK, "--json", "--log-dir", folder / "logs")
    result = tandem.run("bench", *words, PYTHONPATH=f"{folder}{os.pathsep}{PROJECT_ROOT}")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["speculation"] is None
    assert "warning: --speculate has no effect" in result.stderr


def test_ranks_of_torchrun(tandem: "Tandem", shape: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m", "launcher", "bench"]
    words = ["--model-config", shape, "--random-weights", *QUICK, "--json", "--log-dir", tandem.new_folder() / "logs"]
    result = tandem.run_command([*command, *words])
    assert result.returncode == 0, result.stderr
    _check(json.loads(result.stdout), 2)
    assert json.loads(result.stdout)["speculation"] is None, "it was not asked for"


Make = Callable[["Checkpoints", Path], list[str | Path]]


def _random(*words: str) -> Make:
    def make(checkpoints: "Checkpoints", folder: Path) -> list[str | Path]:
        (folder / "config.json").write_text(json.dumps(VALUES))
        return ["bench", "--model-config", folder / "config.json", "--random-weights", *words]

    return make


def _without_tokenizer(checkpoints: "Checkpoints", folder: Path) -> list[str | Path]:
    shutil.copytree(checkpoints.int8, folder / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    return ["bench", "--checkpoint", folder / "bare", "--speculate"]


REFUSED: dict[str, tuple[Make, list[str]]] = {
    "a checkpoint and random weights": (
        lambda made, folder: ["bench", "--checkpoint", made.int8, "--random-weights"],
        ["--checkpoint", "--random-weights"],
    ),
    "random weights of no shape": (lambda made, folder: ["bench", "--random-weights"], ["--model-config"]),
    "a shape without random weights": (
        lambda made, folder: ["bench", "--model-config", made.int8 / "config.json"],
        ["--model-config", "--random-weights"],
    ),
    "quantization of a checkpoint": (
        lambda made, folder: ["bench", "--checkpoint", made.int8, "--quantization", "a8w8"],
        ["--quantization", "--random-weights"],
    ),
    "quantization declared twice": (
        lambda made, folder: ["bench", "--model-config", made.int8 / "config.json", "--random-weights", "--quantization", "a8w8"],
        ["a8w8", "declares rtn-a16w8"],
    ),
    "quantization that needs data": (_random("--quantization", "smooth_quant"), ["smooth_quant", "rtn-a16w4"]),
    "guesses at random weights": (_random("--speculate"), ["--speculate", "--random-weights", "depends on the text", "--checkpoint"]),
    "guesses without a tokenizer": (_without_tokenizer, ["bare has no tokenizer"]),
    "nothing": (lambda made, folder: ["bench"], ["--checkpoint"]),
    "too many layers": (_random("--num-layers", "4"), ["--num-layers is 4", "has 3"]),
    "too many ranks": (_random("--workers", "100"), ["100"]),
    "no batch": (_random("--batch-size", "1,0"), ["'0'"]),
    "a prompt beyond the context": (_random("--prompt-tokens", "96"), ["--prompt-tokens is 96", "1 to 95"]),
    "more tokens than the context": (_random("--new-tokens", "95"), ["--new-tokens is 95", "1 to 94"]),
    "no rounds": (_random("--rounds", "0"), ["--rounds is 0"]),
    "an unknown type": (_random("--dtype", "int3"), ["int3"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_contradicts_itself_is_refused_before_anything_starts(refuse: Callable[..., None], name: str) -> None:
    make, names = REFUSED[name]
    refuse(make, names, False)
