"""Draft models: whatever they draft, the tokens are those of plain decoding, greedy and sampled, on any number of ranks."""

import dataclasses
import json
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.checkpoint.formats import open_checkpoint
from model.decoder.llama import LlamaForCausalLM
from model.decoder.loading import load_model
from model.engine.events import TokenEvent
from model.engine.generation import Engine, generate
from model.engine.grammar import Grammars, grammar_of_regex
from model.engine.request import Request
from model.engine.sampling import RandomNumbers
from model.engine.sampling_params import SamplingParams
from model.engine.speculation import DraftPace
from model.spec.config import build_config
from model.spec.scheme import read_scheme
from model.text.tokenizer import read_tokenizer
from parallel.collectives import Collectives

pytestmark = pytest.mark.usefixtures("one_thread", "invariant")

PROMPTS = ((1,), (1, 403, 407, 261, 378), tuple(range(3, 43)) * 2, (5, 6, 7, 8, 5, 6, 7), tuple(range(3, 43)), (9,) * 30)
RULES: tuple[dict[str, Any], ...] = (
    {},
    {"logprobs": True, "top_logprobs": 2},
    {"repetition_penalty": 1.2, "ignore_eos": False},
    {"frequency_penalty": 0.5, "bad_words": ((261,), (403, 407)), "min_tokens": 5},
    {"do_sample": True, "top_k": 5},
    {"do_sample": True, "top_k": 0, "temperature": 0.7, "ignore_eos": False},
    {"do_sample": True, "top_k": 0, "top_p": 0.8, "repetition_penalty": 1.1, "presence_penalty": 0.5},
    {"do_sample": True, "top_k": 9, "min_p": 0.05, "stop_token_ids": (261,)},
)


@pytest.fixture
def invariant(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model is taken for one whose bits do not depend on the rows of a pass; in float32 its tokens do not."""
    monkeypatch.setattr(LlamaForCausalLM, "batch_invariant", property(lambda self: True))


@pytest.fixture(scope="module")
def small(stories: Path, keep_layers: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return keep_layers(stories, 3, tmp_path_factory.mktemp("draft") / "stories-3-layers")


@pytest.fixture(scope="module")
def model(stories: Path, build_model: Callable[..., LlamaForCausalLM]) -> LlamaForCausalLM:
    return build_model(stories)


@pytest.fixture(scope="module")
def drafter(small: Path, build_model: Callable[..., LlamaForCausalLM]) -> LlamaForCausalLM:
    return build_model(small)


def ask(new: int = 40, **rules: Any) -> list[Request]:
    rules = {"ignore_eos": True, **rules}
    return [Request(i, prompt, SamplingParams(max_new_tokens=new, seed=i, **rules)) for i, prompt in enumerate(PROMPTS)]


def run(model: LlamaForCausalLM, requests: list[Request], **options: Any) -> tuple[list[list[TokenEvent]], Engine]:
    engine = Engine(model, **options)
    events = list(generate(engine, requests))
    return [[event for event in events if event.index == request.index] for request in requests], engine


def tokens_of(events: list[list[TokenEvent]]) -> list[list[tuple[int, str | None]]]:
    return [[(event.token_id, event.finish_reason) for event in mine] for mine in events]


@pytest.mark.parametrize("rules", RULES, ids=str)
def test_tokens_are_those_of_plain_decoding(model: LlamaForCausalLM, drafter: LlamaForCausalLM, rules: dict[str, Any]) -> None:
    requests = ask(**rules)
    expected, plain = run(model, requests)
    found, engine = run(model, requests, draft_model=drafter)
    assert tokens_of(found) == tokens_of(expected)
    for event, other in zip(chain(*found), chain(*expected), strict=True):
        assert (event.logprob is None) == (other.logprob is None)
        if other.logprob is not None:
            assert event.logprob == pytest.approx(other.logprob, abs=1e-4)
    assert 0 < engine.times.accepted_tokens < engine.times.speculated_tokens
    assert engine.times.decode_tokens == plain.times.decode_tokens
    assert engine.num_used_blocks == 0


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"max_batch_size": 1, "draft_tokens": 1},
        {"num_blocks": 14, "draft_tokens": 7},
        {"num_blocks": 14, "max_batch_size": 6, "prefill_tokens": 16},
        {"share_prefixes": False, "block_size": 32},
    ],
    ids=str,
)
def test_batches_and_scarce_memory_change_nothing(
    model: LlamaForCausalLM, drafter: LlamaForCausalLM, options: dict[str, Any], do_sample: bool
) -> None:
    requests = ask(60, do_sample=do_sample, top_k=8)
    expected, _ = run(model, requests)
    found, engine = run(model, requests, draft_model=drafter, **options)
    assert tokens_of(found) == tokens_of(expected)
    assert engine.times.accepted_tokens > 0 and engine.num_used_blocks == 0


@pytest.mark.parametrize("rules", [{}, RULES[5], RULES[6]], ids=str)
@pytest.mark.parametrize("num_blocks", [None, 14])
def test_a_draft_model_that_equals_the_large_one_is_always_right(
    model: LlamaForCausalLM, rules: dict[str, Any], num_blocks: int | None
) -> None:
    """Also behind shared blocks and after preemption: its KV cache never lacks a token."""
    requests = ask(41, **{**rules, "ignore_eos": True})
    _, engine = run(model, requests, draft_model=model, draft_tokens=4, num_blocks=num_blocks)
    times = engine.times
    assert times.accepted_tokens == times.speculated_tokens > 0
    if num_blocks is None:  # 40 tokens after the first, 5 at a time
        assert times.accepted_tokens == 32 * len(requests)
    else:
        assert engine.counts.preemptions > 0


def test_a_useless_draft_model_is_asked_less_and_less(model: LlamaForCausalLM, stories: Path, build_model: Any) -> None:
    broken = build_model(stories)
    with torch.no_grad():
        broken.norm.weight.neg_()
    requests = ask(100)[:1]
    expected, _ = run(model, requests)
    found, engine = run(model, requests, draft_model=broken)
    assert tokens_of(found) == tokens_of(expected)
    assert engine.times.accepted_tokens == 0 and 0 < engine.times.speculated_tokens < 20


def test_a_draft_model_whose_logits_are_nan_drafts_nothing(model: LlamaForCausalLM, stories: Path, build_model: Any) -> None:
    broken = build_model(stories)
    with torch.no_grad():
        broken.norm.weight.fill_(torch.nan)
    requests = ask(20)
    expected, _ = run(model, requests)
    found, engine = run(model, requests, draft_model=broken)
    assert found == expected and engine.times.speculated_tokens == 0


def test_a_shorter_context_of_the_draft_model_ends_its_drafts(model: LlamaForCausalLM, small: Path, build_model: Any) -> None:
    drafter = build_model(small)
    drafter.config = dataclasses.replace(drafter.config, max_position_embeddings=48)
    requests = ask(60)
    expected, _ = run(model, requests)
    found, engine = run(model, requests, draft_model=drafter)
    assert tokens_of(found) == tokens_of(expected)
    assert engine.times.accepted_tokens > 0
    assert run(model, requests[2:3], draft_model=drafter)[1].times.speculated_tokens == 0, "its prompt alone is longer"


def test_a_smaller_vocabulary_ends_drafts_at_ids_that_it_lacks(model: LlamaForCausalLM, stories: Path, build_model: Any) -> None:
    """Vocabularies are padded differently; padding ids are never sampled in earnest, but a prompt may name one."""
    drafter = build_model(stories)
    drafter.config = dataclasses.replace(drafter.config, vocab_size=400)
    requests = ask(30)
    expected, _ = run(model, requests)
    found, engine = run(model, requests, draft_model=drafter)
    assert tokens_of(found) == tokens_of(expected) and engine.times.accepted_tokens > 0
    assert run(model, requests[1:2], draft_model=drafter)[1].times.speculated_tokens == 0, "its prompt has id 403"


@pytest.mark.parametrize("rules", [{}, RULES[4]], ids=str)
@pytest.mark.parametrize("prefill_resumed", [False, True])
def test_a_run_that_is_cut_anywhere_continues_with_the_same_tokens(
    model: LlamaForCausalLM, drafter: LlamaForCausalLM, rules: dict[str, Any], prefill_resumed: bool
) -> None:
    requests = ask(24, **rules)[:4]
    options: dict[str, Any] = {"max_batch_size": 3, "num_blocks": 16, "draft_model": drafter, "prefill_resumed": prefill_resumed}
    expected, _ = run(model, requests)
    events = list(generate(Engine(model, **options), requests))
    for cut in range(0, len(events) + 1, 7):
        mine = [[event for event in events[:cut] if event.index == request.index] for request in requests]
        known = [
            dataclasses.replace(r, resumed_ids=tuple(e.token_id for e in ours), known_reason=ours[-1].finish_reason if ours else None)
            for r, ours in zip(requests, mine, strict=True)
        ]
        rest = list(generate(Engine(model, **options), known))
        found = [ours + [event for event in rest if event.index == r.index] for r, ours in zip(requests, mine, strict=True)]
        assert tokens_of(found) == tokens_of(expected), f"cut after {cut}"


def test_grammars_hold(model: LlamaForCausalLM, drafter: LlamaForCausalLM, stories: Path) -> None:
    def open_grammars() -> Grammars:
        return Grammars(lambda: read_tokenizer(stories), model.config.vocab_size, model.config.eos_token_ids)

    grammar = grammar_of_regex("[A-Z][a-z ]{9,50}[.]")
    for rules in ({}, {"do_sample": True, "top_k": 0}):
        requests = ask(40, grammar=grammar, **rules)[:3] + ask(40, **rules)[3:]
        expected, _ = run(model, requests, grammars=open_grammars())
        found, engine = run(model, requests, grammars=open_grammars(), draft_model=drafter)
        assert tokens_of(found) == tokens_of(expected)
        assert engine.times.accepted_tokens > 0


def test_cancelled_requests_leave_the_others_alone(model: LlamaForCausalLM, drafter: LlamaForCausalLM) -> None:
    requests = ask(30, do_sample=True, top_k=8)
    expected, _ = run(model, requests)
    engine, events = Engine(model, draft_model=drafter), []
    for request in requests:
        engine.add(request)
    for step in range(1000):
        events += engine.step()
        if step == 5:
            engine.cancel(1)
        if not engine.has_unfinished:
            break
    found = [[event for event in events if event.index == request.index] for request in requests]
    assert tokens_of(found[:1] + found[2:]) == tokens_of(expected[:1] + expected[2:])
    assert engine.num_used_blocks == 0


def test_ranks_draft_alike(stories: Path, small: Path, run_ranks: Callable[..., list[Any]]) -> None:
    def load(collectives: Collectives) -> LlamaForCausalLM:
        source = open_checkpoint(small)
        config, scheme = build_config(source.config), read_scheme(source.config)
        drafter = LlamaForCausalLM(config, scheme, collectives, dtype="float32", device=torch.device("cpu"))
        load_model(drafter, source)
        return drafter

    def decode(model: LlamaForCausalLM) -> list[tuple[Any, int, int]]:
        drafter, results = load(model.collectives), []
        for rules in ({}, {"do_sample": True, "top_k": 0, "top_p": 0.9}):
            found, engine = run(model, ask(**rules), draft_model=drafter, num_blocks=20)
            results.append((tokens_of(found), engine.times.speculated_tokens, engine.times.accepted_tokens))
        return results

    (expected,) = run_ranks(stories, 1, decode)
    for world_size in (2, 3):
        for found in run_ranks(stories, world_size, decode):
            assert found == expected


def test_a_model_whose_bits_depend_on_the_batch_uses_no_draft_model(
    model: LlamaForCausalLM, drafter: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LlamaForCausalLM, "batch_invariant", property(lambda self: False))
    found, engine = run(model, ask(20), draft_model=drafter)
    assert not engine.speculates and engine.times.speculated_tokens == 0
    assert found == run(model, ask(20))[0]


def test_first_layers_have_the_shape_that_config_says(small: Path) -> None:
    assert json.loads((small / "config.json").read_text())["num_hidden_layers"] == 3


@given(seed=st.integers(0, 2**32 - 1), places=st.lists(st.one_of(st.none(), st.integers(0, 9)), max_size=30))
@settings(max_examples=50, deadline=None)
def test_numbers_read_ahead_are_those_drawn_later(seed: int, places: list[int | None]) -> None:
    numbers, plain, drawn = RandomNumbers(seed), np.random.RandomState(seed).random_sample(400), 0
    for place in places:
        if place is None:
            assert numbers.draw() == plain[drawn]
            drawn += 1
        else:
            assert numbers.peek(place) == plain[drawn + place]


def test_a_pace_returns_to_full_speed_after_one_right_draft() -> None:
    pace = DraftPace(4)
    assert pace.plan() == 4
    pace.judge(4, 2)
    assert pace.plan() == 3
    for _ in range(3):
        pace.judge(1, 0)
    assert [pace.plan() for _ in range(3)] == [0, 0, 1]
    pace.judge(1, 1)
    assert pace.plan() == 4
