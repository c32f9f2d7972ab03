"""`tandem eval` as users run it: transformers' perplexity, the same score for any number of ranks, and what is printed."""

import json
import math
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from launcher.commands.evaluate import write_json

if TYPE_CHECKING:
    from tests.end_to_end.conftest import Checkpoints, Tandem

TEXT = "A llama is an animal that lives in the mountains. Two riders sit on one bicycle, and the tea is warm. \n"
WINDOW = 48
QUESTIONS = [("is the tea warm", True), ("are the streets narrow", False), ("is there a town", True), ("do llamas drink tea", False)]
PERPLEXITY_FIELDS = ["perplexity", "nll_mean", "num_tokens", "num_windows", "interval", "interval_unit"]
BOOLQ_FIELDS = ["accuracy", "num_correct", "num_questions", "interval", "yes_share"]
RUN_FIELDS = ["quantization", "dtype", "world_size", "seconds", "tokens_per_second"]


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text file of some hundred tokens."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT * 8, encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BoolQ file of four questions, with a blank line in it."""
    records = [{"question": question, "title": "Town", "passage": TEXT * 2, "answer": answer} for question, answer in QUESTIONS]
    path = tmp_path_factory.mktemp("boolq") / "dev.jsonl"
    path.write_text("\n\n".join(map(json.dumps, records)) + "\n", encoding="utf-8")
    return path


def _score(tandem: "Tandem", checkpoint: Path, task: str, data: Path, *options: str) -> tuple[dict[str, Any], str]:
    """The object on standard output, which holds nothing else, and standard error."""
    words = ("--task", task, "--data", data, "--checkpoint", checkpoint, "--log-dir", tandem.new_folder() / "logs", "--json")
    result = tandem.run("eval", *words, *options)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("\n") == 1
    score: dict[str, Any] = json.loads(result.stdout)
    return score, result.stderr


def _without_speed(score: dict[str, Any]) -> str:
    return json.dumps({name: value for name, value in score.items() if name not in ("seconds", "tokens_per_second", "world_size")})


@pytest.fixture(scope="session")
def perplexity(tandem: "Tandem", checkpoints: "Checkpoints", text: Path) -> dict[str, Any]:
    """The score of the float checkpoint by one rank."""
    score, _ = _score(tandem, checkpoints.float, "perplexity", text, "--window", str(WINDOW), "--workers", "1")
    return score


def test_perplexity_is_that_of_transformers(checkpoints: "Checkpoints", text: Path, perplexity: dict[str, Any]) -> None:
    from tokenizers import Tokenizer

    ids = Tokenizer.from_file(str(checkpoints.float / "tokenizer.json")).encode(text.read_text()).ids
    windows = [ids[first : first + WINDOW] for first in range(0, len(ids) - 1, WINDOW)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import LlamaForCausalLM

        model = LlamaForCausalLM.from_pretrained(checkpoints.float, dtype=torch.float32)
    with torch.inference_mode():
        losses = [model(torch.tensor([window]), labels=torch.tensor([window])).loss.item() * (len(window) - 1) for window in windows]
    num_tokens = sum(len(window) - 1 for window in windows)
    assert list(perplexity) == ["task", "checkpoint", "data", *PERPLEXITY_FIELDS, *RUN_FIELDS]
    assert (perplexity["num_windows"], perplexity["num_tokens"]) == (len(windows), num_tokens)
    assert perplexity["nll_mean"] == pytest.approx(sum(losses) / num_tokens, rel=1e-5)
    assert perplexity["perplexity"] == pytest.approx(math.exp(sum(losses) / num_tokens), rel=1e-4)
    low, high = perplexity["interval"]
    assert low < perplexity["perplexity"] < high
    assert (perplexity["task"], perplexity["data"]) == ("perplexity", str(text))
    assert (perplexity["quantization"], perplexity["dtype"], perplexity["world_size"]) == ("none", "float32", 1)


@pytest.mark.parametrize("workers", ["2", "3"])
def test_perplexity_is_the_same_number_for_any_number_of_ranks(
    tandem: "Tandem", checkpoints: "Checkpoints", text: Path, perplexity: dict[str, Any], workers: str
) -> None:
    score, told = _score(tandem, checkpoints.float, "perplexity", text, "--window", str(WINDOW), "--workers", workers)
    assert score["world_size"] == int(workers)
    assert _without_speed(score) == _without_speed(perplexity)
    windows = perplexity["num_windows"]
    assert f"perplexity, windows: {windows} of {windows}" in told


def test_boolq_of_an_int8_checkpoint_is_the_same_for_any_number_of_ranks(
    tandem: "Tandem", checkpoints: "Checkpoints", questions: Path
) -> None:
    """The YAML asks for three ranks; rank files are read as well as one file."""
    config = ("--config", str(checkpoints.int8_config))
    one, _ = _score(tandem, checkpoints.int8, "boolq", questions, *config, "--workers", "1")
    three, _ = _score(tandem, checkpoints.int8_two_ranks, "boolq", questions, *config)
    assert list(one) == ["task", "checkpoint", "data", *BOOLQ_FIELDS, *RUN_FIELDS]
    assert three["world_size"] == 3
    assert _without_speed({**three, "checkpoint": ""}) == _without_speed({**one, "checkpoint": ""})
    assert one["num_questions"] == len(QUESTIONS)
    assert one["accuracy"] == one["num_correct"] / len(QUESTIONS)
    assert one["quantization"] == "rtn-a16w8"


def test_lines_for_people_tell_score_size_and_run(tandem: "Tandem", checkpoints: "Checkpoints", questions: Path, text: Path) -> None:
    words = ("--checkpoint", checkpoints.float, "--limit", "2", "--workers", "1")
    result = tandem.run("eval", "--task", "boolq", "-s", questions, *words, "--log-dir", tandem.new_folder())
    assert result.returncode == 0, result.stderr
    score, answers, run = result.stdout.splitlines()
    assert score.startswith("accuracy ") and " of 2), 95 % between " in score
    assert answers.startswith("answered yes to ")
    assert run.startswith("none, float32, 1 rank(s), ")

    options = ("--window", "32", "--kv-cache-dtype", "int8")
    result = tandem.run("eval", "--task", "perplexity", "--data", text, *words, *options, "--log-dir", tandem.new_folder())
    assert result.returncode == 0, result.stderr
    score, size, run = result.stdout.splitlines()
    assert score.startswith("perplexity ") and score.endswith("(by token)")
    assert size.startswith("62 tokens in 2 windows, mean loss ")
    assert run.startswith("c8, float32, 1 rank(s), ")


def test_an_evaluation_joins_a_launcher_as_its_ranks(
    tandem: "Tandem", checkpoints: "Checkpoints", text: Path, perplexity: dict[str, Any]
) -> None:
    """Under torchrun; rank 0 alone prints."""
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "launcher")
    words = ("eval", "--task", "perplexity", "--data", text, "--checkpoint", checkpoints.float, "--window", str(WINDOW), "--json")
    result = tandem.run_command([*launcher, *words], cwd=tandem.new_folder(), OMP_NUM_THREADS="1")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("\n") == 1
    assert _without_speed(json.loads(result.stdout)) == _without_speed(perplexity)


def test_a_perplexity_beyond_float64_is_json() -> None:
    found = json.loads(write_json({"perplexity": math.inf, "nll_mean": 800.5, "interval": (3.0, math.inf)}), parse_constant=pytest.fail)
    assert found == {"perplexity": None, "nll_mean": 800.5, "interval": None}
    assert json.loads(write_json({"accuracy": 0.5, "interval": (0.25, 0.75)})) == {"accuracy": 0.5, "interval": [0.25, 0.75]}
