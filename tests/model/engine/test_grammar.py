"""Grammars: the masks that rank 0 sends, and answers that keep to them on any number of ranks, with drafts, and after a restart."""

import dataclasses
import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from model.decoder.llama import LlamaForCausalLM
from model.engine.events import TokenEvent
from model.engine.generation import Engine, generate
from model.engine.grammar import (
    Grammars,
    count_mask_bytes,
    grammar_of_choices,
    grammar_of_regex,
    grammar_of_schema,
    grammar_of_text,
)
from model.engine.grammar_masks import share_masks
from model.engine.request import Request
from model.engine.sampling_params import SamplingParams
from model.text.tokenizer import read_tokenizer
from parallel.errors import RequestError

pytestmark = pytest.mark.usefixtures("one_thread")

PIECES = ('{"', '":', '": ', '",', '"}', "true", "false", "null", "name", "age", "ing", "12", "\n", " the", ', "')
EOS = 256
VOCAB = 300
"""Every byte, the end of a sequence, some longer tokens, and some ids without a token."""


class PieceTokenizer:
    """Bytes and a few longer tokens."""

    special_ids = frozenset((EOS,))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        return b"".join(self.token_bytes(token) for token in ids if token != EOS).decode(errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        if token_id < 256:
            return bytes([token_id])
        if token_id == EOS:
            return b"</s>"
        return PIECES[token_id - EOS - 1].encode() if token_id - EOS - 1 < len(PIECES) else b""


TOKENIZER: Any = PieceTokenizer()
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "minimum": 0, "maximum": 150}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
GRAMMARS = {
    "schema": grammar_of_schema(SCHEMA, {"whitespace_flexible": False}),
    "regex": grammar_of_regex("[0-9]{3}-[a-f]{2,4}"),
    "choices": grammar_of_choices(["red", "green", 'a "quoted" \\ one']),
    "text": grammar_of_text('root ::= "(" root ")" | "x"'),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(5)
    config = transformers.LlamaConfig(
        num_hidden_layers=1,
        max_position_embeddings=600,
        hidden_size=64,
        intermediate_size=96,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=VOCAB,
        initializer_range=0.2,
        eos_token_id=EOS,
    )
    folder = tmp_path_factory.mktemp("grammar") / "model"
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(folder: Path, build_model: Callable[..., LlamaForCausalLM]) -> LlamaForCausalLM:
    return build_model(folder)


def open_grammars() -> Grammars:
    return Grammars(lambda: TOKENIZER, VOCAB, (EOS,))


def ask(**options: Any) -> list[Request]:
    """One request for each grammar, and an unlimited one."""
    params = SamplingParams(**{"max_new_tokens": 60, **options})
    grammars = ["", *GRAMMARS.values()]
    return [Request(n, (65, 66, n + 65), dataclasses.replace(params, grammar=grammar, seed=n)) for n, grammar in enumerate(grammars)]


def run(model: LlamaForCausalLM, requests: Sequence[Request], **options: Any) -> tuple[list[str], list[TokenEvent]]:
    engine, events = Engine(model, grammars=open_grammars(), **options), list[TokenEvent]()
    for request in requests:
        engine.add(request)
    while engine.has_unfinished:
        events += engine.step()
        assert not engine.failures
    return [TOKENIZER.decode([event.token_id for event in events if event.index == one.index]) for one in requests], events


def check(texts: Sequence[str]) -> None:
    """Fail unless each text but the first keeps to its grammar."""
    person = json.loads(texts[1])
    assert list(person) == ["name", "age"] and len(person["name"]) <= 8 and 0 <= person["age"] <= 150
    assert re.fullmatch("[0-9]{3}-[a-f]{2,4}", texts[2])
    assert texts[3] in ("red", "green", 'a "quoted" \\ one')
    assert re.fullmatch(r"\(*x\)*", texts[4]) and texts[4].count("(") == texts[4].count(")")


SAMPLED = {"do_sample": True, "temperature": 1.5, "top_k": 0}


@pytest.mark.parametrize("sampling", [{}, SAMPLED, {**SAMPLED, "top_k": 20}, {"logprobs": True}], ids=str)
def test_answers_keep_to_their_grammars_with_the_same_text_on_any_number_of_ranks(
    folder: Path, run_ranks: Callable[..., list[Any]], model: LlamaForCausalLM, sampling: dict[str, Any]
) -> None:
    bias = tuple((byte, 4.0) for byte in b'"x')  # so that strings and nesting end
    alone, events = run(model, ask(**sampling, logit_bias=bias))
    check(alone)
    assert {event.index for event in events if event.finish_reason == "eos"} >= {1, 2, 3, 4}
    for world_size in (2, 3):
        every = run_ranks(folder, world_size, lambda rank: run(rank, ask(**sampling, logit_bias=bias))[0])
        assert every == [alone] * world_size


def test_a_grammar_ends_an_answer_even_if_the_end_is_to_be_ignored(model: LlamaForCausalLM) -> None:
    check(run(model, ask(ignore_eos=True, logit_bias=((ord('"'), 9.0), (ord("x"), 9.0))))[0])


def test_drafts_do_not_change_a_limited_answer(
    model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch, folder: Path, run_ranks: Callable[..., list[Any]]
) -> None:
    monkeypatch.setattr(LlamaForCausalLM, "batch_invariant", property(lambda self: True))
    numbers = {"type": "array", "items": {"const": 12}, "minItems": 12, "maxItems": 12}
    grammar = grammar_of_schema(numbers, {"whitespace_flexible": False})
    requests = [*ask(), Request(9, tuple(b"[12,12,12,12,"), SamplingParams(max_new_tokens=80, grammar=grammar))]
    plain, _ = run(model, requests)
    engine = Engine(model, grammars=open_grammars(), speculate=True)
    drafted, _ = run(model, requests, speculate=True)
    assert drafted == plain and json.loads(plain[-1]) == [12] * 12
    assert run_ranks(folder, 2, lambda rank: run(rank, requests, speculate=True)[0]) == [plain] * 2
    engine.add(requests[-1])
    while engine.has_unfinished:
        engine.step()
    assert engine.times.accepted_tokens > 10, "drafts were verified under the grammar"


@pytest.mark.parametrize("prefill", [False, True])
@pytest.mark.parametrize("num_known", [1, 4, 7])
def test_a_restart_resumes_the_grammar_where_it_was(model: LlamaForCausalLM, prefill: bool, num_known: int) -> None:
    requests = ask(**SAMPLED, logit_bias=((ord('"'), 4.0), (ord("x"), 4.0)))
    whole, events = run(model, requests)
    known = {one.index: tuple(event.token_id for event in events if event.index == one.index)[:num_known] for one in requests}
    ended = {event.index for event in events if event.finish_reason and event.position < num_known}
    resumed = [dataclasses.replace(one, resumed_ids=known[one.index]) for one in requests if one.index not in ended]
    assert len(resumed) > 2
    _, rest = run(model, resumed, prefill_resumed=prefill)
    for one in resumed:
        ids = [*known[one.index], *(event.token_id for event in rest if event.index == one.index)]
        assert TOKENIZER.decode(ids) == whole[one.index]


def test_masks_of_drafts_are_those_of_plain_steps() -> None:
    text = b'{"name":"ab","age":7}'
    plain, drafted = open_grammars().start(GRAMMARS["schema"]), open_grammars().start(GRAMMARS["schema"])
    masks = []
    for token in text:
        masks += plain.compute_masks()
        plain.accept(token)
    masks += plain.compute_masks()
    assert drafted.compute_masks(tuple(text)) == masks
    assert drafted.compute_masks(()) == masks[:1], "drafts do not advance the parser"
    wrong = drafted.compute_masks((*text[:3], ord("!"), *text[3:5]))
    assert wrong[:4] == masks[:4] and wrong[4:] == [b"\xff" * count_mask_bytes(VOCAB)] * 3
    assert drafted.compute_masks((*text, EOS, EOS))[: len(masks)] == masks


def test_masks_reach_every_rank(gather_ranks: Callable[..., list[Any]]) -> None:
    allowed = np.random.RandomState(0).random_sample((3, VOCAB)) < 0.3
    padded = np.pad(allowed, ((0, 0), (0, 8 * count_mask_bytes(VOCAB) - VOCAB)))
    masks = [np.packbits(row, bitorder="little").tobytes() for row in padded]

    def share(collectives: Any) -> Any:
        return share_masks(masks if collectives.rank == 0 else (), 3, VOCAB, collectives)

    for found in gather_ranks(3, share):
        assert (found == allowed).all()


@pytest.mark.parametrize(
    ("grammar", "words"),
    [
        (grammar_of_schema({"type": "objec"}), "Invalid type: objec"),
        (grammar_of_schema({"not": {"type": "string"}}), "Unimplemented keys"),
        (grammar_of_regex("(a"), "unclosed group"),
        (grammar_of_regex("(?=a)b"), "look-around"),
        ("{", "EOF|expected"),
    ],
)
def test_a_grammar_that_cannot_be_used_is_refused(grammar: str, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        open_grammars().check(grammar)


def test_a_model_without_an_end_cannot_be_limited() -> None:
    with pytest.raises(RequestError, match="needs an end-of-sequence token"):
        Grammars(lambda: TOKENIZER, VOCAB, ()).check(GRAMMARS["regex"])


def test_an_engine_without_grammars_refuses_limited_requests(model: LlamaForCausalLM) -> None:
    with pytest.raises(RequestError, match="structured output is not available"):
        Engine(model).add(ask()[1])


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_sequence_without_an_allowed_token_fails_alone(folder: Path, run_ranks: Callable[..., list[Any]], world_size: int) -> None:
    """Ids that the grammar does not allow are all that is left."""
    requests = ask()
    requests[2] = dataclasses.replace(requests[2], params=dataclasses.replace(requests[2].params, allowed_token_ids=(ord("z"),)))
    broken = Request(7, (65,), SamplingParams(max_new_tokens=5, grammar="{"))

    def work(model: LlamaForCausalLM) -> Any:
        engine, failures, ended = Engine(model, grammars=open_grammars()), [], []
        for request in (*requests, broken):
            engine.add(request)
        while engine.has_unfinished:
            ended += [event.index for event in engine.step() if event.finish_reason]
            failures += engine.failures
        return sorted(ended), [(one.index, one.position) for one in failures], [one.message for one in failures]

    results = run_ranks(folder, world_size, work)
    for ended, failures, _ in results:
        assert ended == [0, 1, 3, 4] and failures == [(2, 0), (7, 0)]
    assert all(message.startswith("no token is allowed at step 1: ") for message in results[0][2])
    assert "restrictions of the request" in results[0][2][0]


def test_schemas_that_are_nested_too_deeply_and_grammars_that_are_too_large_are_refused() -> None:
    deep: dict[str, Any] = {"type": "integer"}
    for _ in range(5000):
        deep = {"type": "array", "items": deep}
    with pytest.raises(RequestError, match="the JSON schema cannot be used"):
        grammar_of_schema(deep)
    with pytest.raises(RequestError, match=r"too (big|large)|limit|exceed|many"):
        open_grammars().check(grammar_of_text("start: " + " ".join(f'("{number}" "x")*' for number in range(60_000))))


def test_a_sentencepiece_tokenizer_puts_no_space_into_a_forced_text(stories: Path, build_model: Callable[..., LlamaForCausalLM]) -> None:
    """Llama's tokenizer begins every text with a space; a text that the grammar forces continues another one."""
    model, tokenizer = build_model(stories), read_tokenizer(stories)
    grammars = Grammars(lambda: tokenizer, model.config.vocab_size, model.config.eos_token_ids)
    for text in ("Tom. sat,  down", "a{2}", " x", "\u00e9t\u00e9"):
        params = SamplingParams(max_new_tokens=60, grammar=grammar_of_choices([text]))
        events = list(generate(Engine(model, grammars=grammars), [Request(0, (1, 403, 407), params)]))
        ids = [event.token_id for event in events if event.finish_reason is None]
        assert b"".join(map(tokenizer.token_bytes, ids)).decode() == text and events[-1].finish_reason == "eos"
