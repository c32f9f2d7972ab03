"""A generation that goes on where another one was cut off gives the rest of it, bit for bit, and leaves out what nobody needs."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from model.generation import Engine, Request, TokenEvent, check_request, generate
from model.llama import LlamaForCausalLM
from model.sampling import SamplingParams
from parallel.errors import RequestError

PROMPTS = ((5, 60, 7), (9, 8, 7, 6, 5, 4, 3, 41, 42, 43, 44), (70,), (12, 13, 14, 15, 16, 17), (1, 2, 3, 4))
LENGTHS = (7, 2, 5, 1, 4)
WAYS: dict[str, dict[str, Any]] = {
    "greedy with log-probabilities": {"logprobs": True},
    "sampling": {"do_sample": True, "top_k": 7, "top_p": 0.9, "repetition_penalty": 1.3, "seed": 5},
    "sampling among all with log-probabilities": {"do_sample": True, "top_k": 0, "temperature": 0.8, "logprobs": True},
    "ends by itself": {"do_sample": True, "top_k": 0, "temperature": 3.0, "ignore_eos": False},
}


@pytest.fixture(scope="module")
def model(tiny_llama: Callable[[str], Path], build_model: Callable[..., LlamaForCausalLM]) -> LlamaForCausalLM:
    return build_model(tiny_llama("nine_heads"))


def ask(**options: Any) -> list[Request]:
    return [
        Request(index, prompt, SamplingParams(**{"ignore_eos": True, **options, "max_new_tokens": length}))
        for index, (prompt, length) in enumerate(zip(PROMPTS, LENGTHS, strict=True))
    ]


def know(requests: Sequence[Request], events: Sequence[TokenEvent]) -> list[Request]:
    """The requests with what the events told."""
    known = []
    for request in requests:
        mine = [event for event in events if event.index == request.index]
        reason = mine[-1].finish_reason if mine else None
        known.append(replace(request, known_ids=tuple(event.token_id for event in mine), known_reason=reason))
    return known


@pytest.mark.parametrize("max_batch_size", [1, 2, 3])
@pytest.mark.parametrize("way", WAYS)
def test_from_any_cut_on_the_rest_is_the_same(model: LlamaForCausalLM, way: str, max_batch_size: int) -> None:
    requests = ask(**WAYS[way])
    whole = list(generate(Engine(model, max_batch_size), requests))
    assert [event.position for event in whole if event.index == 0] == list(range(sum(event.index == 0 for event in whole)))
    for cut in range(0, len(whole) + 1, max_batch_size):
        assert list(generate(Engine(model, max_batch_size), know(requests, whole[:cut]))) == whole[cut:], cut


def test_only_finished_ones_known_is_as_good(model: LlamaForCausalLM) -> None:
    """What a file of results holds: whole prompts, those that ended first."""
    requests = ask(logprobs=True)
    whole = list(generate(Engine(model, 2), requests))
    ended = [event.index for event in whole if event.finish_reason]
    for count in range(1, len(ended) + 1):
        done = ended[:count]
        known = know(requests, [event for event in whole if event.index in done])
        rest = [event for event in whole if event.index not in done]
        assert list(generate(Engine(model, 2), known)) == rest


def test_steps_that_nobody_needs_are_left_out(model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    plain, plain_logits = LlamaForCausalLM.forward, LlamaForCausalLM.logits_local
    heads: list[int] = []

    def forward(self: LlamaForCausalLM, spans: Any) -> Any:
        calls.append(len(spans))
        return plain(self, spans)

    def logits_local(self: LlamaForCausalLM, hidden: Any) -> Any:
        heads.append(len(hidden))
        return plain_logits(self, hidden)

    monkeypatch.setattr(LlamaForCausalLM, "forward", forward)
    monkeypatch.setattr(LlamaForCausalLM, "logits_local", logits_local)
    requests = ask()
    whole = list(generate(Engine(model, 1), requests))
    undisturbed = len(calls)
    assert undisturbed == sum(LENGTHS) == len(heads)

    calls.clear(), heads.clear()
    assert list(generate(Engine(model, 1), know(requests, whole))) == []
    assert (calls, heads) == ([], []), "all is known"

    first = LENGTHS[0]
    engine = Engine(model, 1)
    assert list(generate(engine, know(requests, whole[: first + 1]))) == whole[first + 1 :]
    assert len(calls) == undisturbed - first, "the first has ended, the second is needed from its prompt on"
    assert len(heads) == undisturbed - first - 1, "its first token is known"
    assert engine.times.decode_tokens + len(PROMPTS) - 2 == sum(LENGTHS) - first - 1, "known tokens are not counted as decoded"


@pytest.mark.parametrize(
    ("known", "words"),
    [
        ({"known_ids": (1, 2, 3)}, "3 new tokens already, but 1 to 2 are asked for"),
        ({"known_reason": "length"}, "0 new tokens already"),
        ({"known_ids": (10**6,)}, "has id 1000000"),
    ],
)
def test_what_cannot_be_known_is_refused(known: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        check_request(Request(0, (1, 2), SamplingParams(max_new_tokens=2), **known), 100, 200)
