"""What `tandem bench --speculate` decodes, and what it makes of speeds and tokens; engines are played here."""

from collections.abc import Iterator
from typing import Any, cast

import pytest

from launcher.job.speculation_prompts import NEW_TOKENS, PROMPTS, describe_row, encode_prompts
from launcher.worker.speculation_bench import measure_speculation
from model.decoder.llama import LlamaForCausalLM
from model.engine.events import TokenEvent
from model.engine.generation import EngineTimes
from model.engine.request import Request
from model.text.tokenizer import Tokenizer
from parallel.collectives import IdentityCollectives
from parallel.errors import RequestError, RunError

MODEL = cast(LlamaForCausalLM, object())  # the played engine does not look at it
IDS = (5, 6, 7, 8)


class FakeTokenizer:
    """An id for each byte."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())


def encode(context_tokens: int, vocab_size: int = 256) -> tuple[Request, ...]:
    return encode_prompts(cast(Tokenizer, FakeTokenizer()), context_tokens, vocab_size)


class PlayedEngine:
    """Gives out prepared speeds in turn: seconds of decoding by whether it guesses."""

    seconds: dict[bool, Iterator[float]]
    ids: dict[bool, tuple[int, ...]]
    guessed: tuple[int, int]
    can_guess: bool
    asked: list[tuple[bool, tuple[int, ...]]]

    def __init__(self, model: object, max_batch_size: int, *, num_blocks: int, speculate: bool = False) -> None:
        assert (model, max_batch_size) == (MODEL, 1)
        self.speculates = speculate and self.can_guess
        self.times = EngineTimes()
        self.has_unfinished = False

    def add(self, request: Request) -> None:
        self.asked.append((self.speculates, request.prompt_ids))
        self.has_unfinished = True

    failures: tuple[()] = ()

    def step(self) -> list[TokenEvent]:
        self.has_unfinished = False
        self.times.decode_tokens, self.times.decode_seconds = 6, next(self.seconds[self.speculates])
        if self.speculates:
            self.times.speculated_tokens, self.times.accepted_tokens = self.guessed
        return [TokenEvent(0, token, None, None, position) for position, token in enumerate(self.ids[self.speculates])]


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> type[PlayedEngine]:
    """Three rounds of two prompts: 6 tokens in 3, 1 and 2 seconds, with guesses in 1, 2 and 0.5."""
    played = type("Played", (PlayedEngine,), {})
    played.seconds = {False: iter((3, 1, 2) * 2), True: iter((1, 2, 0.5) * 2)}
    played.ids = {False: IDS, True: IDS}
    played.guessed, played.can_guess, played.asked = (8, 6), True, []
    monkeypatch.setattr("launcher.worker.speculation_bench.Engine", played)
    return played


def measure(on_decoded: Any = lambda: None) -> list[dict[str, Any]] | None:
    return measure_speculation(MODEL, IdentityCollectives(), encode(4096), 3, on_decoded)


def test_prompts_are_whole_where_the_context_is_long() -> None:
    requests = encode(4096)
    assert [bytes(request.prompt_ids).decode() for request in requests] == list(PROMPTS.values())
    assert all(request.params.max_new_tokens == NEW_TOKENS and request.params.ignore_eos for request in requests)
    assert not any(request.params.do_sample for request in requests)


@pytest.mark.parametrize(("context", "new"), [(3, 2), (4, 2), (5, 2), (20, 10), (127, 63), (128, 64), (200, 64)])
def test_a_short_context_cuts_the_beginning_and_the_new_tokens(context: int, new: int) -> None:
    for request, text in zip(encode(context), PROMPTS.values(), strict=True):
        assert request.params.max_new_tokens == new
        assert bytes(request.prompt_ids).decode() == text[-(context - new) :]


def test_ids_of_another_tokenizer_are_refused() -> None:
    with pytest.raises(RequestError, match="the vocabulary has 100: is it another model's tokenizer"):
        encode(4096, vocab_size=100)


def test_the_copy_prompt_holds_what_it_asks_for() -> None:
    assert PROMPTS["copy"].count("Anna") == 2 and PROMPTS["copy"].count("Maria") == 1


def test_the_gain_is_the_ratio_of_medians_over_rounds_in_turns(engine: type[PlayedEngine]) -> None:
    steps: list[int] = []
    rows = measure(lambda: steps.append(len(engine.asked)))
    expected = {
        "tokens_per_second_plain": 3.0,
        "tokens_per_second": 6.0,
        "gain": 2.0,
        "accepted_share": 0.75,
        "identical": True,
    }
    assert rows == [{"prompt": "copy", **expected}, {"prompt": "free", **expected}]
    assert [guesses for guesses, _ in engine.asked] == [False, True] * 6
    assert [bytes(ids).decode() for _, ids in engine.asked] == [PROMPTS["copy"]] * 6 + [PROMPTS["free"]] * 6
    assert steps == list(range(1, 13)), "each run is reported when it is over"


def test_without_a_guess_there_is_no_share(engine: type[PlayedEngine]) -> None:
    engine.guessed = (0, 0)
    rows = measure()
    assert rows is not None and [row["accepted_share"] for row in rows] == [None, None]
    assert "no draft tokens" in describe_row(rows[0])


def test_an_engine_that_does_not_guess_is_not_measured(engine: type[PlayedEngine]) -> None:
    engine.can_guess = False
    assert measure() is None
    assert engine.asked == []


def test_a_token_that_differs_is_an_error(engine: type[PlayedEngine]) -> None:
    engine.ids = {False: IDS, True: (5, 6, 9, 8)}
    with pytest.raises(RunError, match="new token 2 of the copy prompt is 9 in one run and 7 in another"):
        measure()


def test_a_row_in_words() -> None:
    row = {"prompt": "copy", "tokens_per_second_plain": 100.04, "tokens_per_second": 250.1, "gain": 2.5, "accepted_share": 0.755}
    assert describe_row(row) == (
        "speculate    250.1 tokens/s, copy prompt, batch 1: 2.50 times the 100.0 without; 76% of the draft tokens were accepted, "
        "the tokens are identical"
    )
