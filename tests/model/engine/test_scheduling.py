"""Continuous batching in blocks: whoever joins, leaves, shares or gives way, every prompt goes on as it would alone."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from model.decoder.llama import LlamaForCausalLM
from model.engine.events import TokenEvent
from model.engine.generation import Engine, generate
from model.engine.request import Request, plan_blocks
from model.engine.sampling_params import SamplingParams
from model.spec.config import PREFILL_TOKENS
from parallel.errors import ConfigError, RequestError

pytestmark = pytest.mark.usefixtures("one_thread")

STORY = tuple((37 * i * i + 11 * i + 5) % 500 + 3 for i in range(400))


@pytest.fixture(scope="module")
def model(stories: Path, build_model: Callable[..., LlamaForCausalLM]) -> LlamaForCausalLM:
    return build_model(stories)


@pytest.fixture(scope="module")
def tiny(tiny_llama: Callable[[str], Path], build_model: Callable[..., LlamaForCausalLM]) -> LlamaForCausalLM:
    """Random, with a context of 1200 tokens."""
    return build_model(tiny_llama("nine_heads"))


def ask(*prompts: tuple[int, ...], new: int = 20, **rules: Any) -> list[Request]:
    """Every third of them samples."""
    params = SamplingParams(max_new_tokens=new, ignore_eos=True, **rules)
    drawn = dataclasses.replace(params, do_sample=True, top_k=0, temperature=0.8)
    return [Request(index, prompt, params if index % 3 else dataclasses.replace(drawn, seed=index)) for index, prompt in enumerate(prompts)]


def mixed_prompts() -> list[tuple[int, ...]]:
    return [STORY[start : start + length] for start, length in ((0, 3), (20, 90), (5, 1), (7, 33), (0, 64), (30, 17), (50, 200), (9, 16))]


def collect(events: list[TokenEvent], requests: list[Request]) -> list[list[int]]:
    return [[event.token_id for event in events if event.index == request.index] for request in requests]


def run(model: LlamaForCausalLM, requests: list[Request], max_batch_size: int = 16, **options: Any) -> list[list[int]]:
    return collect(list(generate(Engine(model, max_batch_size, **options), requests)), requests)


def run_alone(model: LlamaForCausalLM, requests: list[Request]) -> list[list[int]]:
    return [run(model, [request], share_prefixes=False)[0] for request in requests]


@pytest.fixture
def passes(model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Tokens of every sequence in each pass through the model so far."""
    seen: list[list[int]] = []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda spans: (seen.append([len(span.ids) for span in spans]), forward(spans))[1])
    return seen


@pytest.mark.parametrize("options", [{}, {"share_prefixes": False}, {"block_size": 48}, {"num_blocks": 14}, {"num_blocks": 17}], ids=str)
@pytest.mark.parametrize("max_batch_size", [3, 16])
def test_prompts_of_mixed_length_go_on_as_each_alone(model: LlamaForCausalLM, max_batch_size: int, options: dict[str, Any]) -> None:
    requests = ask(*mixed_prompts())
    assert run(model, requests, max_batch_size, **options) == run_alone(model, requests)


@pytest.mark.parametrize("kind", ["token", None])
def test_any_block_size_and_an_int8_cache_go_on_the_same(
    model: LlamaForCausalLM, kind: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "scheme", dataclasses.replace(model.scheme, kv_cache=kind))
    requests = ask(*mixed_prompts())
    expected = run_alone(model, requests)
    for block_size, num_blocks in ((16, 15), (32, None), (256, None)):
        assert run(model, requests, block_size=block_size, num_blocks=num_blocks) == expected, block_size


def test_who_joins_later_goes_on_as_alone_and_others_do_not_wait(model: LlamaForCausalLM, passes: list[list[int]]) -> None:
    """A prompt of 400 tokens and one of 300 join while two decode: each pass has a token of those that decode, and no pass is too long."""
    requests = ask(STORY[:3], STORY[4:9], STORY, STORY[60:360])
    engine, events = Engine(model), []
    for request in requests[:2]:
        engine.add(request)
    for _ in range(4):
        events += engine.step()
    passes.clear()
    for request in requests[2:]:
        engine.add(request)
    events += engine.step()
    assert passes == [[1, 1, 210, 300]] and {event.index for event in events[-3:]} == {0, 1, 3}
    events += engine.step()
    assert passes[1] == [1, 1, 190, 1]
    while engine.has_unfinished:
        events += engine.step()
    assert collect(events, requests) == run_alone(model, requests)
    assert engine.num_used_blocks == 0 and engine.step() == []


def test_a_long_prompt_runs_in_bounded_passes_while_another_decodes(tiny: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[int]] = []
    forward = tiny.forward
    monkeypatch.setattr(tiny, "forward", lambda spans: (seen.append([len(span.ids) for span in spans]), forward(spans))[1])
    long = tuple((31 * i + 7) % 97 for i in range(1100))
    run(tiny, ask((5, 6, 7), long, new=4))
    assert seen == [[3, PREFILL_TOKENS - 3], [1, PREFILL_TOKENS - 1], [1, 1100 - 2 * PREFILL_TOKENS + 4], [1, 1], [1], [1]]


def test_sequences_give_way_and_come_back_with_the_same_tokens(model: LlamaForCausalLM, passes: list[list[int]]) -> None:
    """Four prompts of one block each in five blocks: all decode until they need a second block each."""
    requests = ask(*(STORY[start : start + 10] for start in (0, 50, 100, 150)), new=40)
    expected = run_alone(model, requests)
    for share in (True, False):
        passes.clear()
        engine = Engine(model, num_blocks=5, share_prefixes=share)
        events = list(generate(engine, requests))
        assert collect(events, requests) == expected
        assert [len(spans) for spans in passes[:8]] == [4] * 7 + [2]  # the last gives way, the third waits
        assert sum(map(sum, passes)) > sum(len(r.prompt_ids) + 39 for r in requests), "something was computed again"
        assert [event.position for event in events if event.index == 3] == list(range(40))
        assert engine.num_used_blocks == 0


def test_the_least_memory_is_enough_for_any_number_of_requests(model: LlamaForCausalLM) -> None:
    requests = ask(*(STORY[start : start + 13] for start in range(0, 60, 6)), new=36)
    assert plan_blocks(requests, 1, 16) == 3
    expected = run_alone(model, requests)
    for num_blocks in (3, 4, 7):
        assert run(model, requests, num_blocks=num_blocks) == expected


def test_a_request_that_never_fits_the_cache_is_refused_before_any_step(model: LlamaForCausalLM) -> None:
    engine = Engine(model, num_blocks=3)
    engine.add(Request(0, STORY[:40], SamplingParams(max_new_tokens=9)))
    with pytest.raises(RequestError, match="prompt 1 has 40 tokens and asks for 10 new ones, but the key-value cache holds 3 blocks of 16"):
        engine.add(Request(1, STORY[:40], SamplingParams(max_new_tokens=10)))
    with pytest.raises(ConfigError, match="block_size is 24, but has to be a multiple of 16"):
        Engine(model, block_size=24)


def test_a_shared_prefix_is_stored_and_computed_once(model: LlamaForCausalLM, passes: list[list[int]]) -> None:
    """Six prompts with 100 tokens in common: those that come with the first in one pass share what it is about to fill."""
    prompts = [(*STORY[:100], *STORY[start : start + 5]) for start in range(100, 160, 10)]
    requests = ask(*prompts, new=6)
    expected = run_alone(model, requests)
    passes.clear()
    engine = Engine(model)
    for request in requests:
        engine.add(request)
    events = engine.step()
    assert passes == [[105, 9, 9, 9, 9, 9]]
    assert engine.num_used_blocks == 6 + 6 * 1  # 96 tokens are shared, 9 are everybody's own
    assert engine.times.prefill_tokens == 105 + 5 * 9
    while engine.has_unfinished:
        events += engine.step()
    assert collect(events, requests) == expected
    plain = Engine(model, share_prefixes=False)
    for request in requests:
        plain.add(request)
    plain.step()
    plain.step()  # 630 tokens do not fit one pass
    assert plain.num_used_blocks == 6 * 7


def test_a_prefix_is_kept_when_nobody_has_it_and_goes_when_its_memory_is_needed(model: LlamaForCausalLM, passes: list[list[int]]) -> None:
    first, other = ask(STORY[:80], STORY[100:370], new=2)
    engine = Engine(model, num_blocks=18)
    list(generate(engine, [first]))
    list(generate(engine, [first]))
    list(generate(engine, [other]))  # 17 blocks of 18
    list(generate(engine, [first]))
    assert [spans for spans in passes if spans != [1]] == [[80], [16], [270], [64]]


def test_what_came_of_a_cancelled_request_is_free_again(model: LlamaForCausalLM) -> None:
    requests = ask(*mixed_prompts(), new=30)
    expected = run_alone(model, requests)
    engine, events = Engine(model, 4), []
    for request in requests:
        engine.add(request)
    for _ in range(5):
        events += engine.step()
    for index in (1, 3, 6, 99):  # two that run, one that waits, one that is not there
        engine.cancel(index)
    while engine.has_unfinished:
        events += engine.step()
    found = collect(events, requests)
    for index, tokens in enumerate(expected):
        assert found[index] == (tokens[: len(found[index])] if index in (1, 3, 6) else tokens)
    assert 0 < len(found[1]) < 30 and found[6] == []
    assert engine.num_used_blocks == 0


@pytest.mark.parametrize("options", [{}, {"num_blocks": 14}, {"num_blocks": 16, "share_prefixes": False}], ids=str)
def test_a_run_that_is_cut_anywhere_takes_the_same_passes_again(
    model: LlamaForCausalLM, passes: list[list[int]], options: dict[str, Any]
) -> None:
    """With shared prefixes, chunks and sequences that give way; the events that are left are the same, log-probabilities and all."""
    prompts = [*mixed_prompts(), STORY[:70], (*STORY[:48], 9, 9, 9)]
    requests = [
        dataclasses.replace(r, params=dataclasses.replace(r.params, max_new_tokens=5 + 4 * (r.index % 4)))
        for r in ask(*prompts, logprobs=True)
    ]
    events = list(generate(Engine(model, 5, **options), requests))
    whole = list(passes)
    for cut in range(0, len(events) + 1, 5):
        passes.clear()
        rest = list(generate(Engine(model, 5, **options), know(requests, events[:cut])))
        assert rest == events[cut:], f"cut after {cut}"
        left = iter(whole)
        assert all(spans in left for spans in passes), "passes are left out, none is another"


def know(requests: list[Request], events: list[TokenEvent]) -> list[Request]:
    """The requests after an attempt that came as far as these events."""
    mine = [[event for event in events if event.index == request.index] for request in requests]
    return [
        dataclasses.replace(
            request, resumed_ids=tuple(event.token_id for event in ours), known_reason=ours[-1].finish_reason if ours else None
        )
        for request, ours in zip(requests, mine, strict=True)
    ]


def test_a_prefix_that_was_left_out_is_computed_for_those_that_need_it(model: LlamaForCausalLM, passes: list[list[int]]) -> None:
    """The first is known whole. Nobody needs it, so that it is left out, until one with its beginning is there or comes later."""
    first, second = ask(STORY[:50], (*STORY[:40], 7, 8), new=3)
    first, second = (dataclasses.replace(one, params=SamplingParams(max_new_tokens=3, ignore_eos=True)) for one in (first, second))
    events = list(generate(Engine(model), [first, second]))
    (ended, _) = know([first, second], [event for event in events if event.index == 0])
    passes.clear()
    engine = Engine(model)
    assert list(generate(engine, [ended, second])) == [event for event in events if event.index == 1]
    assert passes == [[50, 10], [1, 1], [1, 1]]
    passes.clear()
    late = Engine(model)
    assert list(generate(late, [ended])) == [] and passes == []
    assert collect(list(generate(late, [second])), [second]) == run_alone(model, [second])


def test_ranks_agree_on_every_pass(stories: Path, run_ranks: Callable[..., list[Any]]) -> None:
    requests = [*ask(*mixed_prompts(), new=12, logprobs=True), *(dataclasses.replace(r, index=50) for r in ask(STORY[:70], new=12))]

    def decode(model: LlamaForCausalLM) -> list[TokenEvent]:
        return list(generate(Engine(model, 4, num_blocks=20), requests))

    (expected,) = run_ranks(stories, 1, decode)
    for world_size in (2, 3):
        for found in run_ranks(stories, world_size, decode):
            assert found == expected


def test_a_short_prompt_does_not_wait_for_long_ones(tiny: LlamaForCausalLM) -> None:
    long = tuple((7 * i) % 50 + 3 for i in range(1100))
    engine = Engine(tiny, 8, prefill_tokens=64)
    for index, prompt in enumerate((long, long[1:], (5, 6, 7, 8))):
        engine.add(Request(index, prompt, SamplingParams(max_new_tokens=4, ignore_eos=True)))
    first_tokens: dict[int, int] = {}
    for number in range(60):
        for event in engine.step():
            first_tokens.setdefault(event.index, number)
    assert first_tokens[2] == 1, "it goes through as soon as those before it have begun"
    # The oldest has a quarter of every pass at least, and all that the others leave.
    assert max(first_tokens.values()) <= 2 * 1100 // 64 + 2


def test_passes_hold_no_more_tokens_than_asked_for(tiny: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    forward = tiny.forward
    monkeypatch.setattr(tiny, "forward", lambda spans: (seen.append(sum(len(span.ids) for span in spans)), forward(spans))[1])
    requests = ask((5, 6, 7), (8,) * 100, tuple(range(3, 60)) * 9, (9,) * 30, new=6)
    found = run(tiny, requests, prefill_tokens=48)
    assert max(seen) == 48
    assert found == run(tiny, requests, prefill_tokens=PREFILL_TOKENS) == run_alone(tiny, requests)


@pytest.mark.parametrize("speculate", [False, True])
def test_known_tokens_go_through_with_their_prompts(model: LlamaForCausalLM, speculate: bool) -> None:
    if not model.batch_invariant:
        pytest.skip("without the own kernels bits depend on the rows of a pass, so known tokens are taken one by one")
    penalties = {"frequency_penalty": 0.7, "repetition_penalty": 1.2}
    requests = ask(*mixed_prompts(), **penalties)
    expected = run_alone(model, requests)
    for known in (1, 7, 19):
        again = [dataclasses.replace(r, resumed_ids=tuple(tokens[:known])) for r, tokens in zip(requests, expected, strict=True)]
        engine = Engine(model, 5, prefill_resumed=True, speculate=speculate)
        events = list(generate(engine, again))
        assert collect(events, again) == [tokens[known:] for tokens in expected]
        assert min(event.position for event in events) == known
        assert engine.num_used_blocks == 0
    ended = dataclasses.replace(requests[0], resumed_ids=(3, 4), known_reason="eos")
    assert not Engine(model, prefill_resumed=True).add(ended) and not list(generate(Engine(model, prefill_resumed=True), [ended]))
