"""JSON schemas of all kinds: every complete answer validates, with the same text on one rank and on two."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator, FormatChecker

from model.decoder.llama import LlamaForCausalLM
from model.engine.generation import Engine
from model.engine.grammar import Grammars, grammar_of_schema
from model.engine.request import Request
from model.engine.sampling_params import SamplingParams
from parallel.errors import RequestError

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]

EOS, VOCAB, BATCH, ROUNDS, NEW_TOKENS = 256, 257, 32, 16, 160
"""512 schemas."""
Schemas = st.SearchStrategy[dict[str, Any]]


class ByteTokenizer:
    """One token a byte."""

    special_ids = frozenset((EOS,))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        return bytes(token for token in ids if token < EOS).decode()

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id]) if token_id < EOS else b"</s>"


TOKENIZER: Any = ByteTokenizer()
NAMES = st.sampled_from(("id", "name", "größe", 'a "b"', "x/y", "$ref", "", "items"))
VALUES = st.one_of(st.none(), st.booleans(), st.integers(-99, 99), st.sampled_from((0.5, -1.25)), st.text('ab"\\ é\n', max_size=6))
PATTERNS = st.sampled_from((r"^[a-z]{2,5}$", r"^\d{3}-\d{2}$", r"^(yes|no)$", "^[A-Z][a-z]{0,3}( [0-9])?$"))
FORMATS = st.sampled_from(("date", "uuid", "ipv4"))


def bound(low: str, high: str, values: st.SearchStrategy[int]) -> Schemas:
    """A lower and an upper limit."""
    return st.tuples(values, values).map(lambda pair: {low: min(pair), high: max(pair)})


SCALARS: Schemas = st.one_of(
    st.sampled_from(({"type": "null"}, {"type": "boolean"}, {"type": "integer"}, {"type": ["integer", "null"]})),
    bound("minimum", "maximum", st.integers(-1000, 1000)).map(lambda limits: {"type": "integer", **limits}),
    bound("minimum", "exclusiveMaximum", st.integers(-50, 50)).map(
        lambda limits: {"type": "number", **limits, "exclusiveMaximum": limits["exclusiveMaximum"] + 1}
    ),
    bound("minLength", "maxLength", st.integers(0, 8)).map(lambda limits: {"type": "string", **limits}),
    PATTERNS.map(lambda pattern: {"type": "string", "pattern": pattern}),
    FORMATS.map(lambda name: {"type": "string", "format": name}),
    st.lists(VALUES, min_size=1, max_size=4).map(lambda values: {"enum": values}),
    VALUES.map(lambda value: {"const": value}),
)


def build_object(schemas: Schemas) -> Schemas:
    """Objects with some required properties, closed or open."""

    def build(parts: tuple[dict[str, Any], list[str], Any]) -> dict[str, Any]:
        properties, required, more = parts
        open_ended = {} if more is None else {"additionalProperties": more}
        return {"type": "object", "properties": properties, "required": [name for name in required if name in properties], **open_ended}

    more = st.one_of(st.just(False), SCALARS.map(lambda schema: schema))
    return st.tuples(st.dictionaries(NAMES, schemas, max_size=3), st.lists(NAMES, unique=True, max_size=4), more).map(build)


def build_array(schemas: Schemas) -> Schemas:
    """Arrays of few items, and tuples."""
    lists = st.tuples(schemas, bound("minItems", "maxItems", st.integers(0, 3))).map(
        lambda pair: {"type": "array", "items": pair[0], **pair[1]}
    )
    tuples = st.lists(schemas, min_size=1, max_size=3).map(
        lambda items: {"type": "array", "prefixItems": items, "items": False, "minItems": len(items)}
    )
    return st.one_of(lists, tuples)


def nest(schemas: Schemas) -> Schemas:
    choices = st.lists(schemas, min_size=1, max_size=3).map(lambda some: {"anyOf": some})
    return st.one_of(build_object(schemas), build_array(schemas), choices)


SCHEMAS: Schemas = st.recursive(SCALARS, nest, max_leaves=6)
REFERENCES: Schemas = SCHEMAS.map(
    lambda schema: {"type": "array", "items": {"$ref": "#/$defs/one"}, "minItems": 1, "maxItems": 2, "$defs": {"one": schema}}
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(6)
    config = transformers.LlamaConfig(
        num_hidden_layers=1,
        max_position_embeddings=512,
        hidden_size=32,
        intermediate_size=32,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=VOCAB,
        initializer_range=0.2,
        eos_token_id=EOS,
    )
    folder = tmp_path_factory.mktemp("schemas") / "model"
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def answer(model: LlamaForCausalLM, grammars: list[str]) -> list[tuple[str, str]]:
    """(text, finish reason) for each grammar."""
    bias = (*((byte, 3.0) for byte in b'"}],'), (EOS, 5.0))  # so that most answers end
    engine = Engine(model, BATCH, grammars=Grammars(lambda: TOKENIZER, VOCAB, (EOS,)))
    for number, grammar in enumerate(grammars):
        params = SamplingParams(
            max_new_tokens=NEW_TOKENS, do_sample=True, top_k=0, temperature=1.2, seed=number, logit_bias=bias, grammar=grammar
        )
        engine.add(Request(number, (65,), params))
    ids: list[list[int]] = [[] for _ in grammars]
    reasons = [""] * len(grammars)
    while engine.has_unfinished:
        for event in engine.step():
            ids[event.index].append(event.token_id)
            reasons[event.index] = event.finish_reason or ""
        assert not engine.failures
    return [(TOKENIZER.decode(some) if reason == "eos" else "", reason) for some, reason in zip(ids, reasons, strict=True)]


COUNTS = {"complete": 0, "cut": 0, "refused": 0}


@given(st.lists(st.one_of(SCHEMAS, REFERENCES), min_size=BATCH, max_size=BATCH))
@settings(
    max_examples=ROUNDS,
    deadline=None,
    derandomize=True,
    phases=(Phase.generate,),
    suppress_health_check=list(HealthCheck),
)
def check_round(folder: Path, run_ranks: Callable[..., list[Any]], schemas: list[dict[str, Any]]) -> None:
    usable = []
    for schema in schemas:
        try:
            grammar = grammar_of_schema(schema)
            Grammars(lambda: TOKENIZER, VOCAB, (EOS,)).check(grammar)
            usable.append((schema, grammar))
        except RequestError:
            COUNTS["refused"] += 1
    (alone,) = run_ranks(folder, 1, lambda model: answer(model, [grammar for _, grammar in usable]))
    assert run_ranks(folder, 2, lambda model: answer(model, [grammar for _, grammar in usable])) == [alone] * 2
    for (schema, _), (text, reason) in zip(usable, alone, strict=True):
        COUNTS["complete" if reason == "eos" else "cut"] += 1
        if reason == "eos":
            # The library's dates have a February 29 in every year, which Python's have not.
            Draft202012Validator(schema, format_checker=FormatChecker(("uuid", "ipv4"))).validate(json.loads(text))


def test_every_answer_validates_on_one_rank_and_on_two(folder: Path, run_ranks: Callable[..., list[Any]]) -> None:
    check_round(folder, run_ranks)
    assert sum(COUNTS.values()) >= 500
    assert COUNTS["complete"] >= 400 and COUNTS["refused"] <= 25, COUNTS
