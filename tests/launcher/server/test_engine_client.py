"""The parent's side of a server: what state it is in, and when another start makes no sense."""

import asyncio
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from msgspec import structs

from launcher.job.messages import Add, Cancel, Command, End, Failures, Loading, Refused
from launcher.job.tasks import Serve
from launcher.server.engine_client import MAX_FAILED_STARTS, EngineClient, Served
from model.engine.events import SequenceFailure
from model.engine.request import Request
from model.engine.sampling_params import SamplingParams
from model.spec.config import LlamaConfig
from tests.launcher.server.rank_events import REPORT, SERVING, tokens

PARAMS = SamplingParams(max_new_tokens=4)
SERVE = Serve(requests=(), num_blocks=9, prefill_tokens=16)


@pytest.fixture
def front() -> Iterator[EngineClient]:
    """Of one rank; its loop can be run by hand."""
    job: Any = SimpleNamespace(world_size=1, max_batch_size=2)
    config: Any = object.__new__(LlamaConfig)
    front = EngineClient(Served(name="m", version="0", config=config, job=job, plans=[], num_blocks=9, max_waiting=5, drain_seconds=60.0))
    front.loop = asyncio.new_event_loop()
    yield front
    front.loop.close()


def settle(front: EngineClient) -> None:
    """Let everything happen that has been asked of the loop."""
    assert front.loop is not None
    front.loop.run_until_complete(asyncio.sleep(0.01))


def become_ready(front: EngineClient) -> list[Command]:
    """The ranks connect and serve; what they are told from now on."""
    told: list[Command] = []
    front.connect(told.append)
    front.on_event(SERVING)
    return told


def fail(front: EngineClient) -> bool:
    """A rank fails, as the agent tells it; whether there was another start."""
    if not front.may_restart():
        return False
    front.note_failure("rank 0 failed", 0.0)
    front.continue_task(Serve(requests=(), num_blocks=9, prefill_tokens=16))
    return True


def test_states_follow_what_the_ranks_do(front: EngineClient, capsys: pytest.CaptureFixture[str]) -> None:
    assert (front.state, front.health, front.answered_once.is_set()) == ("loading", "loading", False)
    front.on_event(Loading(1, 2))
    become_ready(front)
    assert (front.state, front.health, front.answered_once.is_set()) == ("ready", "ok", True)
    fail(front)
    assert (front.state, front.health) == ("recovering", "recovering")
    become_ready(front)
    assert front.health == "ok" and "the ranks are back" in capsys.readouterr().err
    front.close()
    assert front.state == "draining"


def test_silent_ranks_are_told_of_unless_their_steps_are_slow(front: EngineClient, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("launcher.server.engine_client.time", SimpleNamespace(monotonic=lambda: now, time=lambda: now))
    become_ready(front)
    front.on_event(REPORT)
    now = 9.0
    assert front.health == "ok"
    now = 11.0
    assert front.health == "silent"
    front.on_event(structs.replace(REPORT, slowest_seconds=5.0))
    now += 19
    assert front.health == "ok"
    now += 2
    assert front.health == "silent"


def test_starts_that_do_not_come_to_serve_end_a_server(front: EngineClient) -> None:
    assert [fail(front) for _ in range(MAX_FAILED_STARTS)] == [True] * (MAX_FAILED_STARTS - 1) + [False]


def test_starts_in_between_that_serve_make_up_for_those_that_do_not(front: EngineClient) -> None:
    for _ in range(5):
        become_ready(front)
        assert [fail(front) for _ in range(MAX_FAILED_STARTS)] == [True] * MAX_FAILED_STARTS
    assert not fail(front)


def test_what_is_asked_to_stop_while_it_loads_answers_nobody(front: EngineClient) -> None:
    assert front.loop is not None
    ticket = front.loop.run_until_complete(submit(front))
    assert front.ask_to_stop(15) is None
    settle(front)
    assert ticket.events.get_nowait().code == "ended"
    assert (front.state, front.stop_number) == ("draining", 15)


async def submit(front: EngineClient) -> Any:
    return front.dispatcher.submit("a", [((1, 2), PARAMS)], 600.0)


def test_a_request_that_the_ranks_refuse_ends_alone(front: EngineClient) -> None:
    told = become_ready(front)
    assert front.loop is not None
    refused, other = (front.loop.run_until_complete(submit(front)) for _ in range(2))
    front.on_event(Refused(0, "prompt 0 is long"))
    front.on_event(tokens(1, 0, 5, "eos"))
    settle(front)
    error = refused.events.get_nowait()
    assert (error.status, str(error)) == (400, "prompt 0 is long") and other.events.get_nowait()[1].token_id == 5
    assert list(map(type, told)) == [Add, Add, Cancel] and front.continue_task(SERVE).requests == ()


def test_the_ranks_end_when_all_has_been_answered(front: EngineClient) -> None:
    told = become_ready(front)
    assert front.loop is not None
    ticket = front.loop.run_until_complete(submit(front))
    seconds = front.ask_to_stop(15)
    assert seconds is not None and seconds > 60, "the drain and some"
    settle(front)
    assert list(map(type, told)) == [Add]
    front.on_event(tokens(0, 0, 5, "eos"))
    settle(front)
    assert ticket.events.get_nowait()[1].token_id == 5
    assert list(map(type, told)) == [Add, End]
    assert front.ask_to_stop(15) is None, "a second signal ends it at once"


def test_ranks_that_fail_in_a_drain_go_on_and_end_then(front: EngineClient) -> None:
    become_ready(front)
    assert front.loop is not None
    front.loop.run_until_complete(submit(front))
    front.ask_to_stop(15)
    settle(front)
    assert fail(front)
    front.on_event(tokens(0, 0, 5, "eos"))  # last words
    settle(front)
    told = become_ready(front)
    assert list(map(type, told)) == [Cancel, End]


def test_what_is_asked_to_stop_while_ranks_come_back_answers_what_ran(front: EngineClient) -> None:
    become_ready(front)
    assert front.loop is not None
    ticket = front.loop.run_until_complete(submit(front))
    assert fail(front)
    assert front.ask_to_stop(15) is not None
    settle(front)
    assert ticket.events.empty() and front.state == "draining"
    told = become_ready(front)
    front.on_event(tokens(0, 0, 5, "eos"))
    settle(front)
    assert ticket.events.get_nowait()[1].token_id == 5
    assert told == [End()]


def test_nobody_keeps_a_server_that_comes_back_from_its_end(front: EngineClient) -> None:
    become_ready(front)
    assert fail(front)
    assert front.ask_to_stop(15) is None


def test_hopeless_requests_get_an_error(front: EngineClient) -> None:
    assert front.loop is not None
    become_ready(front)
    ticket = front.loop.run_until_complete(submit(front))
    task = Serve(requests=(), num_blocks=9, prefill_tokens=16)
    front.note_failure("rank 0 failed", 0.0)
    again = Serve(requests=(Request(0, (1, 2), PARAMS),), num_blocks=9, prefill_tokens=16, memory_bytes_per_second=1e9)
    assert front.continue_task(task) == again, "the bandwidth is not measured again"
    become_ready(front)
    for _ in range(2):
        fail(front)
        become_ready(front)
    settle(front)
    assert ticket.events.get_nowait().code == "ranks_failed"


def test_reports_are_shown(front: EngineClient) -> None:
    become_ready(front)
    front.on_event(REPORT)
    front.on_event(structs.replace(REPORT, prefill_tokens=100))
    settle(front)
    front.update_metrics()
    text = front.metrics.write().decode()
    for line in ("tandem_kv_blocks_used 3.0", "tandem_kv_blocks 9.0", "tandem_healthy 1.0", 'tandem_rank_step_seconds{rank="0"} 0.5'):
        assert line in text
    assert "tandem_prompt_tokens_per_second 100.0" in text


def test_sequences_without_finite_logits_end_their_calls_alone(front: EngineClient) -> None:
    told = become_ready(front)
    loop = front.loop
    assert loop is not None

    async def ask() -> list[Any]:
        submit = front.dispatcher.submit
        return [submit("a", [((1,), PARAMS)], 60.0), submit("b", [((2,), PARAMS)] * 2, 60.0)]

    healthy, sick = loop.run_until_complete(ask())
    front.on_event(tokens(1, 0, 7))
    front.on_event(Failures((SequenceFailure(1, 1, "the logits are NaN"), SequenceFailure(99, 0, "of a call that has gone"))))
    settle(front)
    events = [sick.events.get_nowait() for _ in range(sick.events.qsize())]
    assert events[0][1].token_id == 7
    assert (events[-1].status, events[-1].code, str(events[-1])) == (500, "logits_not_finite", "the logits are NaN")
    assert healthy.num_open == 1 and front.dispatcher.num_running == 1
    front.continue_task(Serve(requests=(), num_blocks=9, prefill_tokens=16))
    assert not any(isinstance(command, Cancel) for command in told), "the ranks know"
    assert [request.index for request in front._inflight.list_unfinished()] == [0], "nobody gets it again"
