"""What one process writes another reads back as the same value, to the last bit of a float."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from launcher.job.codec import read_command, read_commands, read_event, read_task, write
from launcher.job.messages import (
    Add,
    Cancel,
    Command,
    End,
    Event,
    Failed,
    Failures,
    Loading,
    RankReport,
    RankWarning,
    Refused,
    Report,
    Result,
    Scores,
    Stopped,
    Tokens,
    Working,
)
from launcher.job.tasks import Decode
from model.engine.choice import Choice
from model.engine.events import PromptScore, SequenceFailure, TokenEvent
from model.engine.request import Request
from model.engine.sampling_params import SamplingParams

NUMBERS = st.floats(allow_nan=False)
IDS = st.integers(0, 2**31)
PARAMS = st.builds(
    SamplingParams,
    max_new_tokens=st.integers(1, 9),
    temperature=st.floats(0, exclude_min=True, allow_nan=False),
    top_k=st.integers(0, 10**30),
    seed=st.integers(0, 2**32 - 1),
    logit_bias=st.lists(st.tuples(IDS, NUMBERS)).map(tuple),
    stop_token_ids=st.lists(IDS).map(tuple),
)
REQUESTS = st.builds(
    Request,
    st.integers(0),
    st.lists(IDS, min_size=1).map(tuple),
    PARAMS,
    st.lists(IDS).map(tuple),
    st.sampled_from([None, "eos", "length"]),
)


@given(st.lists(REQUESTS).map(tuple))
def test_requests_come_back_with_the_same_bits(requests: tuple[Request, ...]) -> None:
    back = read_task(write(Decode(requests)))
    assert back == Decode(requests)
    assert repr(back) == repr(Decode(requests)), "-0.0 is equal to 0.0"


def test_whole_numbers_stand_for_floats_and_infinity_stays() -> None:
    params = replace(SamplingParams(max_new_tokens=1), temperature=float("inf"), top_p=1)
    assert read_task(write(Decode((Request(0, (1,), params),)))) == Decode((Request(0, (1,), params),))


INTEGERS = st.integers(0)
TOP = st.lists(st.tuples(IDS, NUMBERS)).map(tuple)
REASONS = st.sampled_from([None, "eos", "length"])
TOKENS = st.builds(TokenEvent, INTEGERS, IDS, st.none() | NUMBERS, REASONS, INTEGERS, TOP)
SCORES = st.builds(PromptScore, INTEGERS, INTEGERS, st.builds(Choice, IDS, st.none() | NUMBERS, TOP))
FAILURES = st.builds(SequenceFailure, INTEGERS, INTEGERS, st.text())
RANKS = st.builds(RankReport, step_seconds=st.none() | NUMBERS, gather_seconds=st.none() | NUMBERS, rss_bytes=INTEGERS)
EVENTS: st.SearchStrategy[Event] = st.one_of(
    st.builds(Loading, INTEGERS, INTEGERS),
    st.builds(Working, INTEGERS, INTEGERS),
    st.builds(RankWarning, st.text()),
    st.builds(Tokens, st.lists(TOKENS).map(tuple)),
    st.builds(Scores, st.lists(SCORES).map(tuple)),
    st.builds(Failures, st.lists(FAILURES).map(tuple)),
    st.builds(Refused, INTEGERS, st.text()),
    st.builds(Failed, st.text()),
    st.just(Stopped()),
    st.builds(Report, ranks=st.lists(RANKS).map(tuple), slowest_seconds=NUMBERS, blocks_used=INTEGERS, prefill_tokens=INTEGERS),
    st.builds(Result, st.dictionaries(st.text(), NUMBERS | INTEGERS | st.none() | st.text() | st.lists(NUMBERS))),
)
COMMANDS: st.SearchStrategy[Command] = st.one_of(st.builds(Add, REQUESTS), st.builds(Cancel, INTEGERS), st.just(End()))


@given(EVENTS)
def test_events_come_back_with_the_same_bits(event: Event) -> None:
    assert repr(read_event(write(event).encode())) == repr(event)


@given(st.lists(COMMANDS))
def test_commands_come_back_alone_and_together(commands: list[Command]) -> None:
    assert read_commands(write(commands)) == commands
    assert [read_command(write(command)) for command in commands] == commands
