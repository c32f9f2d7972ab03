"""Guessed tokens: what is guessed, and that whatever is guessed the tokens are those of plain decoding."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from model.decoder.llama import LlamaForCausalLM
from model.engine.events import TokenEvent
from model.engine.generation import Engine, generate
from model.engine.request import Request
from model.engine.sampling_params import SamplingParams
from model.engine.speculation import MAX_DRAFT, PromptLookup

pytestmark = pytest.mark.usefixtures("one_thread")

# The model tells the same story over and over when it is long enough, so that guesses come true.
PROMPTS = ((1,), (1, 403, 407, 261, 378), tuple(range(3, 43)) * 2, (5, 6, 7, 8, 5, 6, 7), (9,) * 30)


@pytest.fixture(scope="module")
def model(stories: Path, build_model: Callable[..., LlamaForCausalLM]) -> LlamaForCausalLM:
    return build_model(stories)


@pytest.fixture
def invariant(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model is taken for one whose bits do not depend on the rows of a pass; in float32 its tokens do not."""
    monkeypatch.setattr(LlamaForCausalLM, "batch_invariant", property(lambda self: True))


def ask(new: int = 60, **rules: Any) -> list[Request]:
    return [Request(i, prompt, SamplingParams(max_new_tokens=new, **{"ignore_eos": True, **rules})) for i, prompt in enumerate(PROMPTS)]


def run(model: LlamaForCausalLM, requests: list[Request], **options: Any) -> tuple[list[list[TokenEvent]], Engine]:
    engine = Engine(model, **options)
    events = list(generate(engine, requests))
    return [[event for event in events if event.index == request.index] for request in requests], engine


def strip(events: list[list[TokenEvent]]) -> list[list[TokenEvent]]:
    """Without log-probabilities: their last bits depend on the rows of a pass."""
    return [[dataclasses.replace(event, logprob=None) for event in mine] for mine in events]


@pytest.mark.parametrize(
    ("ids", "count", "expected"),
    [
        ((), 8, ()),
        ((1,), 8, ()),
        ((1, 2, 3), 8, ()),
        ((1, 2, 1), 8, (2, 1)),
        ((1, 2, 3, 4, 1, 2), 8, (3, 4, 1, 2)),
        ((1, 2, 3, 4, 1, 2), 2, (3, 4)),
        ((1, 2, 3, 4, 1, 2), 0, ()),
        ((1, 2, 5, 9, 1, 2, 6, 1, 2), 3, (6, 1, 2)),  # the last time counts
        ((7, 1, 2, 5, 0, 8, 1, 2, 6, 7, 1, 2), 1, (5,)),  # three that are the same go before two
        ((4, 4, 4, 4), 8, (4,)),
    ],
)
def test_what_followed_the_last_time_is_guessed(ids: tuple[int, ...], count: int, expected: tuple[int, ...]) -> None:
    whole, pieces = PromptLookup(), PromptLookup()
    whole.extend(ids)
    for token in ids:
        pieces.extend((token,))
    assert whole.draft(count) == pieces.draft(count) == expected


def test_who_guessed_wrong_guesses_less_and_more_seldom() -> None:
    lookup = PromptLookup()
    lookup.extend((1, 2, 3, 4, 5, 6, 7, 8, 9) * 2)
    sizes = []
    for _ in range(60):
        guesses = lookup.draft(MAX_DRAFT)
        sizes.append(len(guesses))
        if guesses:
            lookup.judge(len(guesses), 0)
    assert sizes[:3] == [8, 1, 1] and sum(size > 0 for size in sizes) < 10
    while not (guesses := lookup.draft(MAX_DRAFT)):
        pass
    lookup.judge(1, 1)
    assert len(lookup.draft(MAX_DRAFT)) == MAX_DRAFT, "right guesses bring it back at once"
    lookup.judge(MAX_DRAFT, 3)
    assert len(lookup.draft(MAX_DRAFT)) == 4


@pytest.mark.usefixtures("invariant")
@pytest.mark.parametrize(
    ("rules", "options"),
    [
        ({}, {}),
        ({}, {"max_batch_size": 1}),
        ({}, {"num_blocks": 14}),
        ({}, {"share_prefixes": False, "block_size": 32}),
        ({"repetition_penalty": 1.2}, {}),
        ({"logprobs": True}, {}),
        ({"ignore_eos": False, "new": 200}, {}),
    ],
    ids=str,
)
def test_tokens_are_those_of_plain_decoding(model: LlamaForCausalLM, rules: dict[str, Any], options: dict[str, Any]) -> None:
    requests = ask(**rules)
    expected, plain = run(model, requests, **options)
    found, engine = run(model, requests, speculate=True, **options)
    assert strip(found) == strip(expected)
    for mine, others in zip(found, expected, strict=True):
        for event, other in zip(mine, others, strict=True):
            assert (event.logprob is None) == (other.logprob is None)
            assert event.logprob == pytest.approx(other.logprob, abs=1e-4)
    assert plain.times.speculated_tokens == plain.times.accepted_tokens == 0
    assert engine.times.speculated_tokens >= engine.times.accepted_tokens
    if "repetition_penalty" not in rules:
        assert engine.times.accepted_tokens > 0
    assert engine.times.decode_tokens == plain.times.decode_tokens
    assert engine.num_used_blocks == 0


@pytest.mark.usefixtures("invariant")
def test_right_guesses_save_passes(model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda spans: (sizes.append(len(spans[0].ids)), forward(spans))[1])
    (request,) = ask(new=120)[4:]
    _, engine = run(model, [request], speculate=True)
    times = engine.times
    assert len(sizes) == 120 - times.accepted_tokens < 120
    assert max(sizes[1:]) <= 1 + MAX_DRAFT
    assert sum(sizes[1:]) == len(sizes) - 1 + times.speculated_tokens


@pytest.mark.usefixtures("invariant")
def test_guesses_of_any_quality_change_nothing(model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = ask(new=40)
    expected, _ = run(model, requests)
    truth = {request.index: [event.token_id for event in mine] for request, mine in zip(requests, expected, strict=True)}

    def draft(self: PromptLookup, count: int) -> tuple[int, ...]:
        """Right for a while, a while that differs, then wrong."""
        (index,) = [r.index for r in requests if tuple(self._ids[: len(r.prompt_ids)]) == r.prompt_ids and len(r.prompt_ids) > 1] or [0]
        done = len(self._ids) - len(requests[index].prompt_ids)
        ahead = truth[index][done : done + 8]
        return tuple(token if place < done % 5 else (token + 1) % 512 for place, token in enumerate(ahead))[:count]

    monkeypatch.setattr(PromptLookup, "draft", draft)
    for num_blocks in (None, 13):
        found, engine = run(model, requests, speculate=True, num_blocks=num_blocks)
        assert found == expected
        assert 0 < engine.times.accepted_tokens < engine.times.speculated_tokens


@pytest.mark.usefixtures("invariant")
def test_sampled_sequences_are_not_guessed(model: LlamaForCausalLM) -> None:
    requests = ask(do_sample=True, top_k=5)
    expected, _ = run(model, requests)
    found, engine = run(model, requests, speculate=True)
    assert found == expected and engine.times.speculated_tokens == 0


def test_nothing_is_guessed_where_bits_depend_on_the_rows_of_a_pass(model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LlamaForCausalLM, "batch_invariant", property(lambda self: False))
    requests = ask()
    found, engine = run(model, requests, speculate=True)
    assert not engine.speculates and engine.times.speculated_tokens == 0
    assert found == run(model, requests)[0]


@pytest.mark.usefixtures("invariant")
@pytest.mark.parametrize("ignore_eos", [True, False])
def test_a_run_that_is_cut_anywhere_goes_on_with_the_same_events(model: LlamaForCausalLM, ignore_eos: bool) -> None:
    requests = ask(new=30, logprobs=True, ignore_eos=ignore_eos)
    options: dict[str, Any] = {"max_batch_size": 3, "num_blocks": 12, "speculate": True}
    events = list(generate(Engine(model, **options), requests))
    for cut in range(0, len(events) + 1, 3):
        mine = [[event for event in events[:cut] if event.index == request.index] for request in requests]
        known = [
            dataclasses.replace(r, resumed_ids=tuple(e.token_id for e in ours), known_reason=ours[-1].finish_reason if ours else None)
            for r, ours in zip(requests, mine, strict=True)
        ]
        assert list(generate(Engine(model, **options), known)) == events[cut:], f"cut after {cut}"


@pytest.mark.usefixtures("invariant")
def test_ranks_guess_alike(stories: Path, run_ranks: Callable[..., list[Any]]) -> None:
    def decode(model: LlamaForCausalLM) -> tuple[list[list[TokenEvent]], int]:
        found, engine = run(model, ask(logprobs=True), speculate=True, num_blocks=20)
        return found, engine.times.accepted_tokens

    (expected,) = run_ranks(stories, 1, decode)
    assert expected[1] > 0
    for world_size in (2, 3):
        for found in run_ranks(stories, world_size, decode):
            assert found == expected
