"""SmolLM2-135M with its own first layers as the draft model: the text of 200 prompts, greedy and sampled."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from model.decoder.llama import LlamaForCausalLM
from model.engine.generation import Engine, generate
from model.engine.request import Request
from model.engine.sampling_params import SamplingParams
from model.text.tokenizer import read_tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

FOLDER = Path(__file__).resolve().parents[3] / "output" / "demo" / "smollm2-135m-rtn"
SUBJECTS = (
    *("The capital of France", "A good cup of coffee", "The history of bicycles", "My grandmother", "A llama", "The moon", "The old ferry"),
    *("Python, the programming language,", "A secret garden", "The price of bread", "Winter in the north", "The first telephone", "Water"),
    *("An honest lawyer", "The quickest route", "A small robot", "The tallest mountain", "A list of three colours", "The last train"),
    "Every morning",
)
ENDS = (" is", " was", " and the", " makes people", " has never been", " can be", " in 1900", " looks like", " means", " taught us that")
PROMPTS = [subject + end for subject in SUBJECTS for end in ENDS]


@pytest.mark.parametrize("rules", [{}, {"do_sample": True, "top_k": 0, "temperature": 0.8}], ids=["greedy", "sampled"])
def test_200_texts_are_those_of_plain_decoding(
    build_model: Callable[..., LlamaForCausalLM], keep_layers: Callable[..., Path], tmp_path: Path, rules: dict[str, Any]
) -> None:
    if not FOLDER.is_dir():
        pytest.skip("no output/demo/smollm2-135m-rtn: run scripts/demo.sh")
    model, drafter = build_model(FOLDER, "float16"), build_model(keep_layers(FOLDER, 24, tmp_path / "draft"), "float16")
    if not model.batch_invariant:
        pytest.skip("drafts are verified with the native kernels only")
    tokenizer = read_tokenizer(FOLDER)
    params = [SamplingParams(max_new_tokens=12, seed=seed, ignore_eos=True, **rules) for seed in range(len(PROMPTS))]
    requests = [Request(index, tuple(tokenizer.encode(text)), params[index]) for index, text in enumerate(PROMPTS)]
    plain = sorted((event.index, event.position, event.token_id) for event in generate(Engine(model, 16, num_blocks=64), requests))
    engine = Engine(model, 16, num_blocks=64, draft_model=drafter)
    drafted = sorted((event.index, event.position, event.token_id) for event in generate(engine, requests))
    assert len(requests) == 200 and drafted == plain
    assert 0 < engine.times.accepted_tokens < engine.times.speculated_tokens
