"""Generation: every prompt of a batch goes on as it would alone, and ends where it has to."""

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from model.decoder.llama import LlamaForCausalLM
from model.engine.events import TokenEvent
from model.engine.generation import Engine, EngineTimes, generate
from model.engine.request import Request
from model.engine.sampling_params import SamplingParams
from model.layers.batch import Span
from model.spec.config import PREFILL_TOKENS
from parallel.errors import RequestError
from tandem import AutoModel

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = ((5, 60, 7), (9, 8, 7, 6, 5, 4, 3, 41, 42, 43, 44), (70,), (12, 13, 14, 15, 16, 17), (1, 2, 3, 4))


@pytest.fixture(scope="module")
def model(tiny_llama: Callable[[str], Path], build_model: Callable[..., LlamaForCausalLM]) -> LlamaForCausalLM:
    return build_model(tiny_llama("nine_heads"))


@pytest.fixture
def auto_model(model: LlamaForCausalLM) -> AutoModel:
    return AutoModel(model)


def decode_plainly(model: LlamaForCausalLM, prompt: tuple[int, ...], count: int) -> list[int]:
    """Greedy, one sequence, the whole prefix again for every token."""
    ids = list(prompt)
    for _ in range(count):
        hidden = model([Span(model.build_cache(len(ids)), ids)])
        ids.append(int(model.logits_local(hidden[-1:]).argmax()))
    return ids[len(prompt) :]


def run(model: LlamaForCausalLM, requests: list[Request], max_batch_size: int = 16) -> tuple[list[list[int]], list[TokenEvent]]:
    events = list(generate(Engine(model, max_batch_size), requests))
    return [[event.token_id for event in events if event.index == request.index] for request in requests], events


def ask(prompts: tuple[tuple[int, ...], ...], **options: Any) -> list[Request]:
    params = SamplingParams(**{"max_new_tokens": 12, "ignore_eos": True, **options})
    return [Request(index, prompt, params) for index, prompt in enumerate(prompts)]


@pytest.mark.parametrize("max_batch_size", [2, 16])
def test_ragged_prompts_in_a_batch_go_on_as_each_alone(model: LlamaForCausalLM, max_batch_size: int) -> None:
    found, events = run(model, ask(PROMPTS), max_batch_size)
    assert found == [decode_plainly(model, prompt, 12) for prompt in PROMPTS]
    reasons = [event.finish_reason for event in events if event.finish_reason]
    assert reasons == ["length"] * len(PROMPTS)


def test_no_more_sequences_run_at_once_than_the_batch_holds(model: LlamaForCausalLM) -> None:
    engine = Engine(model, max_batch_size=2)
    for request in ask(PROMPTS, max_new_tokens=3):
        engine.add(request)
    steps = []
    while engine.has_unfinished:
        steps.append([event.index for event in engine.step()])
    assert max(map(len, steps)) == 2
    assert sorted(index for step in steps for index in step) == sorted(list(range(len(PROMPTS))) * 3)


def test_a_sequence_that_ends_makes_room_while_the_others_go_on(model: LlamaForCausalLM) -> None:
    lengths = (9, 2, 5, 1, 3)
    requests = [
        Request(i, p, SamplingParams(max_new_tokens=n, ignore_eos=True)) for i, (p, n) in enumerate(zip(PROMPTS, lengths, strict=True))
    ]
    found, _ = run(model, requests, 2)
    assert found == [decode_plainly(model, prompt, length) for prompt, length in zip(PROMPTS, lengths, strict=True)]


def test_sampled_tokens_do_not_depend_on_who_is_in_the_batch(model: LlamaForCausalLM) -> None:
    requests = [
        Request(i, prompt, SamplingParams(max_new_tokens=10, do_sample=True, top_k=0, temperature=0.7, seed=i, ignore_eos=True))
        for i, prompt in enumerate(PROMPTS)
    ]
    together, _ = run(model, requests)
    assert together == [run(model, [request])[0][0] for request in requests]


def test_an_end_of_sequence_id_ends_its_sequence_only_unless_it_is_ignored(
    model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, _ = run(model, ask(PROMPTS))
    end = plain[0][4]
    monkeypatch.setattr(model, "config", dataclasses.replace(model.config, eos_token_ids=(end, 96)))
    found, events = run(model, ask(PROMPTS, ignore_eos=False))
    ignored, _ = run(model, ask(PROMPTS))
    assert ignored == plain
    for index, tokens in enumerate(plain):
        ends = [place for place, token in enumerate(tokens) if token in (end, 96)]
        assert found[index] == tokens[: ends[0] + 1 if ends else None]
        (last,) = [event for event in events if event.index == index and event.finish_reason]
        assert last.finish_reason == ("eos" if ends else "length")
    assert found[0][-1] == end and len(found[0]) <= 5


def test_a_long_prompt_is_prefilled_in_several_passes(model: LlamaForCausalLM) -> None:
    long = tuple((31 * i + 7) % 97 for i in range(PREFILL_TOKENS + 70))
    prompts = (PROMPTS[0], long, PROMPTS[1])
    found, _ = run(model, ask(prompts, max_new_tokens=3))
    assert found == [decode_plainly(model, prompt, 3) for prompt in prompts]


def test_no_pass_is_longer_than_the_bound(model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda spans: (seen.append(sum(len(span.ids) for span in spans)), forward(spans))[1])
    lengths = (300, 200, 100, PREFILL_TOKENS + 1, 400, 112)
    prompts = tuple(tuple((7 * i + length) % 97 for i in range(length)) for length in lengths)
    run(model, ask(prompts, max_new_tokens=1))
    assert seen == [PREFILL_TOKENS] * 3 + [sum(lengths) - 3 * PREFILL_TOKENS]


def test_log_probabilities_come_with_the_tokens_that_ask(model: LlamaForCausalLM) -> None:
    _, events = run(model, ask(PROMPTS[:2], logprobs=True))
    assert all(event.logprob is not None and event.logprob <= 0 for event in events)
    _, silent = run(model, ask(PROMPTS[:2]))
    assert [event.token_id for event in silent] == [event.token_id for event in events]
    assert all(event.logprob is None for event in silent)


def test_the_engine_counts_what_it_has_done(model: LlamaForCausalLM) -> None:
    engine = Engine(model)
    list(generate(engine, ask(PROMPTS, max_new_tokens=4)))
    assert engine.times.prefill_tokens == sum(map(len, PROMPTS))
    assert engine.times.decode_tokens == 3 * len(PROMPTS)
    assert engine.times.first_token_seconds == pytest.approx(engine.times.prefill_seconds, rel=0.1)  # there is one prefill
    assert engine.times.first_token_seconds > 0 and engine.times.decode_seconds > 0


@pytest.mark.parametrize(
    ("prompt", "max_new_tokens", "words"),
    [
        ((), 5, "prompt 0 has no tokens"),
        ((1,) * 1200, 5, "prompt 0 has 1200 tokens, but the model's context is 1200: shorten it"),
        ((1,) * 1190, 11, "prompt 0 has 1190 tokens and asks for 11 new ones, but the model's context is 1200"),
        ((1, 97), 5, "prompt 0 has id 97, but the vocabulary has 97"),
        ((1, -1), 5, "prompt 0 has id"),
    ],
)
def test_a_request_that_does_not_fit_is_refused(model: LlamaForCausalLM, prompt: tuple[int, ...], max_new_tokens: int, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        Engine(model).add(Request(0, prompt, SamplingParams(max_new_tokens=max_new_tokens)))


# What a run that goes on has to keep: each rule of choosing, ends by eos at uneven places, and neighbours with other rules.
RULES: dict[str, list[dict[str, Any]]] = {
    "greedy": [{}],
    "penalty": [{"repetition_penalty": 1.7}],
    "logprobs": [{"logprobs": True}],
    "top-k": [{"do_sample": True, "top_k": 5, "seed": 3}],
    "top-p": [{"do_sample": True, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.3, "seed": 4}],
    "all": [{"do_sample": True, "top_k": 0, "seed": 5, "logprobs": True}],
    "mixed": [{}, {"do_sample": True, "top_k": 7, "logprobs": True}, {"do_sample": True, "top_k": 0, "repetition_penalty": 1.2}],
}
UNEVEN = (9, 2, 6, 1, 4)


def ask_unevenly(rules: list[dict[str, Any]], *, ignore_eos: bool = True) -> list[Request]:
    return [
        Request(i, prompt, SamplingParams(max_new_tokens=length, ignore_eos=ignore_eos, **rules[i % len(rules)]))
        for i, (prompt, length) in enumerate(zip(PROMPTS, UNEVEN, strict=True))
    ]


def know(requests: list[Request], events: list[TokenEvent]) -> list[Request]:
    """The requests after an attempt that came as far as these events."""
    known = []
    for request in requests:
        mine = [event for event in events if event.index == request.index]
        ids, reason = tuple(event.token_id for event in mine), mine[-1].finish_reason if mine else None
        known.append(dataclasses.replace(request, resumed_ids=ids, known_reason=reason))
    return known


@pytest.fixture
def passes(model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Number of sequences in each pass through the model so far."""
    seen: list[int] = []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda spans: (seen.append(len(spans)), forward(spans))[1])
    return seen


@pytest.mark.parametrize(
    ("rule", "max_batch_size"),
    [("greedy", 3), ("penalty", 2), ("logprobs", 3), ("top-k", 2), ("top-p", 3), ("all", 2), ("mixed", 1), ("mixed", 2), ("mixed", 3)],
)
def test_a_run_that_is_cut_anywhere_goes_on_with_the_same_events_bit_for_bit(
    model: LlamaForCausalLM, rule: str, max_batch_size: int, passes: list[int]
) -> None:
    requests = ask_unevenly(RULES[rule])
    _, events = run(model, requests, max_batch_size)
    assert [sum(event.index == i for event in events) for i in range(len(UNEVEN))] == list(UNEVEN)
    for cut in range(len(events) + 1):
        passes.clear()
        _, rest = run(model, know(requests, events[:cut]), max_batch_size)
        assert rest == events[cut:], f"cut after {cut}"
        assert bool(passes) == (cut < len(events)), "what is known whole needs no model"


@pytest.mark.parametrize("max_batch_size", [1, 3])
def test_a_run_with_ends_of_sequence_goes_on_behind_them(
    model: LlamaForCausalLM, max_batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "config", dataclasses.replace(model.config, eos_token_ids=tuple(range(0, 97, 4))))
    requests = ask_unevenly(RULES["all"], ignore_eos=False)
    _, events = run(model, requests, max_batch_size)
    assert {event.finish_reason for event in events} == {None, "eos", "length"}
    for cut in range(len(events) + 1):
        assert run(model, know(requests, events[:cut]), max_batch_size)[1] == events[cut:], f"cut after {cut}"


def test_prompts_that_take_passes_of_their_own_go_on_too(model: LlamaForCausalLM) -> None:
    long = tuple((31 * i + 7) % 97 for i in range(PREFILL_TOKENS + 70))
    requests = ask((PROMPTS[0], long, PROMPTS[1]), max_new_tokens=2, logprobs=True)
    _, events = run(model, requests, 2)
    for cut in range(len(events) + 1):
        assert run(model, know(requests, events[:cut]), 2)[1] == events[cut:], f"cut after {cut}"


@pytest.mark.parametrize(("max_batch_size", "saved"), [(1, 9 + 2), (2, 2), (3, 2)])
def test_steps_of_ended_sequences_alone_are_not_computed(
    model: LlamaForCausalLM, max_batch_size: int, saved: int, passes: list[int]
) -> None:
    """The first two are known whole. Alone: both; as a pair: until the second ends; of three: what the first has to itself at the end."""
    requests = ask_unevenly(RULES["greedy"])
    _, events = run(model, requests, max_batch_size)
    whole = len(passes)
    passes.clear()
    _, rest = run(model, know(requests, [event for event in events if event.index < 2]), max_batch_size)
    assert rest == [event for event in events if event.index >= 2]
    assert len(passes) == whole - saved


def test_logits_are_computed_only_where_a_token_is_new(model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    logits_local = model.logits_local
    monkeypatch.setattr(model, "logits_local", lambda hidden: (rows.append(len(hidden)), logits_local(hidden))[1])
    requests = ask(PROMPTS[:2], max_new_tokens=5)
    _, events = run(model, requests)
    assert rows == [2] * 5
    for cut in range(len(events) + 1):
        rows.clear()
        run(model, know(requests, events[:cut]))
        assert rows == [2] * (5 - cut // 2), f"cut after {cut}"


def test_known_tokens_do_not_count_as_work(model: LlamaForCausalLM) -> None:
    requests = ask_unevenly(RULES["greedy"])
    _, events = run(model, requests, 1)
    for cut in range(len(events) + 1):
        engine = Engine(model, 1)
        list(generate(engine, know(requests, events[:cut])))
        new = [event for event in events[cut:] if event.position]
        whole = {event.index for event in events[:cut] if event.finish_reason}
        assert engine.times.decode_tokens == len(new), f"cut after {cut}"
        assert (engine.times.decode_seconds > 0) == bool(new)
        assert engine.times.prefill_tokens == sum(len(prompt) for i, prompt in enumerate(PROMPTS) if i not in whole)
        assert (engine.times.first_token_seconds > 0) == (cut < len(events))


def test_what_has_ended_stays_ended_whatever_ids_end_a_sequence_now(model: LlamaForCausalLM, passes: list[int]) -> None:
    first, second = ask(PROMPTS[:2], max_new_tokens=4)
    ended = dataclasses.replace(first, resumed_ids=(5, 6), known_reason="eos")
    assert run(model, [ended])[1] == [] and passes == []
    found, events = run(model, [ended, second])
    assert found == [[], decode_plainly(model, PROMPTS[1], 4)]
    assert [event.position for event in events] == [0, 1, 2, 3]


def test_steps_without_a_new_token_take_no_time_of_decoding(model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.engine.generation.time", SimpleNamespace(perf_counter=itertools.count(100).__next__))
    engine = Engine(model)
    (request,) = ask(PROMPTS[:1], max_new_tokens=5)
    events = list(generate(engine, [dataclasses.replace(request, resumed_ids=(5, 6))]))
    assert [event.position for event in events] == [2, 3, 4]
    # Two looks at the clock a step; the third step makes the first new token.
    assert engine.times == EngineTimes(
        prefill_tokens=3, prefill_seconds=1, decode_tokens=3, decode_seconds=3, first_token_seconds=2 * 3 - 1
    )


def test_a_part_of_a_prompt_that_is_left_out_does_not_count_as_work(model: LlamaForCausalLM, passes: list[int]) -> None:
    long = (4,) * (PREFILL_TOKENS + 2)
    requests = ask(((3,) * (PREFILL_TOKENS + 1), long), max_new_tokens=1)
    _, events = run(model, requests)
    assert passes == [1, 2, 1]
    engine = Engine(model)
    assert list(generate(engine, know(requests, events[:1]))) == events[1:]
    assert (passes[3:], engine.times.prefill_tokens) == ([2, 1], 1 + len(long))


@pytest.mark.parametrize(
    ("resumed_ids", "known_reason", "words"),
    [
        ((1,) * 6, None, "prompt 0 is said to have 6 new tokens already, but 1 to 5 are asked for"),
        ((1,) * 6, "length", "prompt 0 is said to have 6 new tokens already"),
        ((), "eos", "prompt 0 is said to have 0 new tokens already, but 1 to 5 are asked for"),
        ((1, 97), None, "prompt 0 has id 97, but the vocabulary has 97"),
        ((-1,), None, "prompt 0 has id -1, but the vocabulary has 97"),
    ],
)
def test_known_tokens_that_cannot_be_are_refused(
    model: LlamaForCausalLM, resumed_ids: tuple[int, ...], known_reason: str | None, words: str
) -> None:
    good = Request(0, (5,), SamplingParams(max_new_tokens=5), (96,) * 5, "length")
    Engine(model).add(good)
    with pytest.raises(RequestError, match=words):
        Engine(model).add(dataclasses.replace(good, resumed_ids=resumed_ids, known_reason=known_reason))


def test_generate_gives_prompts_and_continuations(auto_model: AutoModel, model: LlamaForCausalLM) -> None:
    expected = [5, 60, 7, *decode_plainly(model, (5, 60, 7), 4)]
    for input_ids in ([5, 60, 7], [[5, 60, 7]], np.array([[5, 60, 7]]), (5, 60, 7)):
        (found,) = auto_model.generate(input_ids, max_new_tokens=4)
        assert found.dtype == np.int32 and found.tolist() == expected


def test_padding_on_the_right_is_no_part_of_a_prompt(auto_model: AutoModel, model: LlamaForCausalLM) -> None:
    rows = auto_model.generate([[5, 60, 7, 0, 0], [9, 8, 7, 6, 5]], max_new_tokens=3)
    # Both rows end at the longest prompt and three: the shorter prompt gets more new tokens.
    assert rows[0].tolist() == [5, 60, 7, *decode_plainly(model, (5, 60, 7), 5)]
    assert rows[1].tolist() == [9, 8, 7, 6, 5, *decode_plainly(model, (9, 8, 7, 6, 5), 3)]


def test_max_length_counts_the_whole_row_and_max_new_tokens_goes_before_it(auto_model: AutoModel) -> None:
    assert len(auto_model.generate([5, 60, 7], max_length=9)[0]) == 9
    assert len(auto_model.generate([5, 60, 7])[0]) == 20
    assert len(auto_model.generate([5, 60, 7], max_length=9, max_new_tokens=2)[0]) == 5


def test_a_loaded_folder_generates_what_its_model_generates(tiny_llama: Callable[[str], Path], auto_model: AutoModel) -> None:
    loaded = AutoModel.from_pretrained(str(tiny_llama("nine_heads")))
    options = {"max_new_tokens": 8, "do_sample": True, "top_k": 10, "seed": 4}
    assert loaded.generate([5, 6], **options)[0].tolist() == auto_model.generate([5, 6], **options)[0].tolist()
    assert auto_model.generate([5, 6], **options)[0].tolist() != auto_model.generate([5, 6], **{**options, "seed": 5})[0].tolist()


@pytest.mark.parametrize(
    ("input_ids", "options", "words"),
    [
        ([[1, 2], [3]], {}, r"input_ids has rows of lengths \[1, 2\]; fill them up"),
        ([1, 2, 3], {"max_length": 3}, "max_length is 3, but the longest prompt has 3 tokens"),
        ([1] * 25, {}, "max_length is 20, but the longest prompt has 25 tokens"),
        ([1, 2], {"do_sample": True, "temperature": 0.0}, "temperature is 0.0"),
        ([1, 97], {}, "prompt 0 has id 97"),
        ([[]], {}, "prompt 0 has no tokens"),
    ],
)
def test_what_cannot_be_generated_is_refused(auto_model: AutoModel, input_ids: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        auto_model.generate(input_ids, **options)


def test_ids_of_a_request_end_its_sequence_alone_even_where_eos_is_ignored(model: LlamaForCausalLM) -> None:
    plain, _ = run(model, ask(PROMPTS))
    end = plain[0][4]
    requests = ask(PROMPTS)
    requests[0] = dataclasses.replace(requests[0], params=dataclasses.replace(requests[0].params, stop_token_ids=(96, end)))
    found, events = run(model, requests)
    assert found == [plain[0][: plain[0].index(end) + 1], *plain[1:]]
    assert [event.finish_reason for event in events if event.index == 0][-1] == "eos"


def test_a_stop_id_outside_of_the_vocabulary_is_refused(model: LlamaForCausalLM) -> None:
    (request,) = ask(PROMPTS[:1], stop_token_ids=(5, 97))
    with pytest.raises(RequestError, match="stop_token_ids names id 97, but the vocabulary has 97"):
        Engine(model).add(request)
