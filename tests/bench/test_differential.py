"""The differential test itself: a few combinations agree, and a checkpoint that is not what transformers loads is reported."""

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from differential import run_combination
from differential_formats import TESTED, Written
from differential_models import DrawnModel
from differential_runs import Ends


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    "formats", [["hf"], ["compressed-tensors"], ["gptq", "awq"], ["gguf"], ["mindspore"], ["meta", "ranks"]], ids="+".join
)
def test_combinations_agree(formats: list[str]) -> None:
    outcome = run_combination(7, len(formats), formats)
    assert outcome.problems == [] and 0 < outcome.error < 1e-3, outcome


def test_other_weights_and_other_ends_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def write(folder: Path, model: DrawnModel, random: random.Random) -> Written:
        written = TESTED["gguf"].write(folder, model, random)
        name = "model.layers.0.self_attn.k_proj.weight"
        return replace(written, weights=written.weights | {name: written.weights[name].flip(0)})

    monkeypatch.setattr("differential.TESTED", {"gguf": replace(TESTED["gguf"], write=write)})
    outcome = run_combination(7, 3, ["gguf"])
    assert any("logits of prompt" in problem for problem in outcome.problems), outcome
    monkeypatch.undo()
    monkeypatch.setattr("differential._draw_ends", lambda random, answers, vocab: Ends((answers.rows[0][0],), (), False))
    monkeypatch.setattr("differential.write_ends", lambda path, ends, random: False)
    outcomes = (run_combination(7, number, ["hf"]) for number in range(30))  # not every drawn model reaches one of its ends
    assert any("ends elsewhere" in problem for outcome in outcomes for problem in outcome.problems)
