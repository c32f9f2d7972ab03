"""Log-probabilities of a prompt's own tokens: transformers', however the prompt goes through the model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model.decoder.llama import LlamaForCausalLM
from model.engine.events import PromptScore, TokenEvent
from model.engine.generation import Engine
from model.engine.request import Request
from model.engine.sampling_params import SamplingParams

pytestmark = pytest.mark.usefixtures("one_thread")

LONG = tuple((31 * i + 7) % 97 for i in range(150))
PROMPTS = ((5, 60, 7), LONG, (70,), (*LONG[:64], 1, 2, 3), LONG)


@pytest.fixture(scope="module")
def model(tiny_llama: Callable[[str], Path], build_model: Callable[..., LlamaForCausalLM]) -> LlamaForCausalLM:
    return build_model(tiny_llama("nine_heads"))


@pytest.fixture(scope="module")
def expected(tiny_llama: Callable[[str], Path]) -> list[np.ndarray[Any, Any]]:
    """Log-softmax of transformers behind each token of each prompt."""
    from transformers import LlamaForCausalLM as Reference

    reference = Reference.from_pretrained(tiny_llama("nine_heads"), dtype=torch.float32).eval()
    with torch.inference_mode():
        return [reference(torch.tensor([prompt])).logits[0].double().log_softmax(-1).numpy() for prompt in PROMPTS]


def run(model: LlamaForCausalLM, requests: list[Request], **options: Any) -> tuple[list[PromptScore], list[TokenEvent]]:
    """All scores and tokens; every score of a prompt comes before its first token."""
    engine = Engine(model, **options)
    for request in requests:
        engine.add(request)
    scores, events = [], list[TokenEvent]()
    while engine.has_unfinished:
        new = engine.step()
        scores += engine.take_scores()
        for event in new:
            length = len(requests[event.index].prompt_ids)
            if requests[event.index].params.prompt_logprobs:
                assert [one.position for one in scores if one.index == event.index] == list(range(1, length))
        events += new
    assert engine.take_scores() == []
    return scores, events


def ask(**options: Any) -> list[Request]:
    params = SamplingParams(max_new_tokens=3, logprobs=True, top_logprobs=2, prompt_logprobs=True, ignore_eos=True, **options)
    return [Request(index, prompt, params) for index, prompt in enumerate(PROMPTS)]


@pytest.mark.parametrize(
    "options",
    [{}, {"prefill_tokens": 37}, {"max_batch_size": 1}, {"share_prefixes": False}, {"num_blocks": 11}, {"speculate": True}],
    ids=str,
)
def test_scores_are_transformers(model: LlamaForCausalLM, expected: list[np.ndarray[Any, Any]], options: dict[str, Any]) -> None:
    scores, _ = run(model, ask(), **options)
    assert len(scores) == sum(len(prompt) - 1 for prompt in PROMPTS)
    for one in scores:
        row, token = expected[one.index][one.position - 1], PROMPTS[one.index][one.position]
        assert one.choice.token_id == token
        assert one.choice.logprob == pytest.approx(row[token], abs=1e-4)
        assert [value for _, value in one.choice.top_logprobs] == pytest.approx(np.sort(row)[:-3:-1], abs=1e-4)


def test_tokens_that_were_decoded_have_the_same_bits_as_a_prompt(model: LlamaForCausalLM) -> None:
    if not model.batch_invariant:
        pytest.skip("without native kernels the low-order bits depend on the batch size")
    _, events = run(model, ask()[:2])
    for index, prompt in enumerate(PROMPTS[:2]):
        new = [event for event in events if event.index == index]
        again = Request(0, (*prompt, *(event.token_id for event in new)), ask()[0].params)
        scores, _ = run(model, [again])
        assert [one.choice[:3] for one in scores[-3:]] == [(event.token_id, event.logprob, event.top_logprobs) for event in new]


def test_nobody_elses_tokens_change(model: LlamaForCausalLM) -> None:
    plain = [Request(one.index, one.prompt_ids, SamplingParams(max_new_tokens=3, ignore_eos=True)) for one in ask()]
    _, expected = run(model, plain)
    scores, found = run(model, [plain[0], ask()[1], *plain[2:]])
    assert [(event.index, event.token_id) for event in found] == [(event.index, event.token_id) for event in expected]
    assert {one.index for one in scores} == {1}


def test_ranks_score_alike_and_only_the_first_tells(
    model: LlamaForCausalLM, tiny_llama: Callable[[str], Path], run_ranks: Callable[..., list[Any]]
) -> None:
    expected, _ = run(model, ask())

    def score(part: LlamaForCausalLM) -> list[PromptScore]:
        engine, scores = Engine(part), list[PromptScore]()
        for request in ask():
            engine.add(request)
        while engine.has_unfinished:
            engine.step()
            scores += engine.take_scores()
        return scores

    first, *others = run_ranks(tiny_llama("nine_heads"), 3, score)
    assert others == [[], []]
    if model.batch_invariant:
        assert first == expected
    else:
        assert [one.choice.logprob for one in first] == pytest.approx([one.choice.logprob for one in expected], abs=1e-5)
