"""The queue of a server: who comes next, who is refused, and what ends a call."""

import asyncio
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest

from launcher.job.messages import Add, Cancel, Command
from launcher.server.errors import ServiceError
from launcher.server.inflight_requests import InflightRequests, NewToken
from launcher.server.metrics import ServeMetrics
from launcher.server.queue import Dispatcher, Ticket
from model.engine.sampling_params import SamplingParams

PARAMS = SamplingParams(max_new_tokens=4)
LONG_SECONDS = 600.0


class Server:
    """A dispatcher, and what it says to the ranks."""

    def __init__(self, max_running: int = 2, max_waiting: int = 100) -> None:
        self.commands: list[Command] = []
        self.metrics, journal = ServeMetrics(), InflightRequests()
        journal.connect(self.commands.append)
        self.dispatcher = Dispatcher(journal, self.metrics, max_running=max_running, max_waiting=max_waiting)

    def ask(self, caller: str, name: int, count: int = 1, seconds: float = LONG_SECONDS) -> Ticket:
        """A call of `count` sequences whose prompts are `name`."""
        return self.dispatcher.submit(caller, [((name,), PARAMS)] * count, seconds)

    @property
    def added(self) -> list[int]:
        """Names of what the ranks got, in order."""
        return [command.request.prompt_ids[0] for command in self.commands if isinstance(command, Add)]

    @property
    def cancelled(self) -> list[int]:
        """Numbers of what the ranks are not to go on with."""
        return [command.index for command in self.commands if isinstance(command, Cancel)]

    def deliver(self, index: int, token: int, reason: str | None = None) -> None:
        """One token of the ranks."""
        self.dispatcher.deliver([(index, NewToken(token, reason, None, ()))])

    def end(self, *indices: int) -> None:
        """The last tokens of these."""
        for index in indices:
            self.deliver(index, 7, "length")


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def work() -> None:
        await asyncio.wait_for(test(), 60)

    asyncio.run(work())


def drain_events(ticket: Ticket) -> list[Any]:
    events = []
    while not ticket.events.empty():
        events.append(ticket.events.get_nowait())
    return events


def test_callers_take_turns_whatever_each_has_asked_for() -> None:
    async def check() -> None:
        server = Server(max_running=1)
        server.ask("a", 10, count=3)
        server.ask("a", 11)
        server.ask("b", 20, count=2)
        server.ask("c", 30)
        for index in (0, 1, 4, 6, 2, 5, 3):
            assert server.dispatcher.num_running == 1
            server.end(index)
        # b came when a had one running and three waiting: a's turn was next, then everybody's.
        assert server.added == [10, 10, 20, 30, 10, 20, 11]
        assert (server.dispatcher.num_running, server.dispatcher.num_waiting) == (0, 0)

    run(check)


def test_ranks_never_get_more_than_run_together() -> None:
    async def check() -> None:
        server = Server(max_running=3)
        server.ask("a", 1, count=5)
        assert (server.dispatcher.num_running, server.dispatcher.num_waiting) == (3, 2)
        server.end(1)
        assert (server.dispatcher.num_running, server.dispatcher.num_waiting) == (3, 1)
        assert server.added == [1] * 4

    run(check)


def test_a_full_queue_refuses_with_a_time_to_try_again() -> None:
    async def check() -> None:
        server = Server(max_running=2, max_waiting=3)
        server.ask("a", 1, count=5)
        with pytest.raises(ServiceError, match="3 sequences wait and ") as refused:
            server.ask("b", 2)
        assert refused.value.status == 429
        assert 1 <= int(refused.value.headers["Retry-After"]) <= 60
        assert server.dispatcher.num_waiting == 3, "nothing of it was queued"
        server.end(0)
        server.ask("b", 2)
        assert server.dispatcher.num_waiting == 3

    run(check)


def test_a_call_is_queued_as_a_whole_or_not_at_all() -> None:
    async def check() -> None:
        server = Server(max_running=2, max_waiting=2)
        server.ask("a", 1)
        with pytest.raises(ServiceError) as refused:
            server.ask("b", 2, count=4)
        assert refused.value.status == 429, "later there may be room"
        with pytest.raises(ServiceError, match="5 answers are requested at once") as refused:
            server.ask("b", 2, count=5)
        assert refused.value.status == 400, "there never will be"
        assert server.added == [1]

    run(check)


def test_without_a_queue_only_what_runs_at_once_is_taken() -> None:
    async def check() -> None:
        server = Server(max_running=1, max_waiting=0)
        server.ask("a", 1)
        with pytest.raises(ServiceError):
            server.ask("a", 1)
        server.end(0)
        server.ask("a", 1)

    run(check)


def test_tokens_come_to_the_call_that_asked_with_the_number_of_the_choice() -> None:
    async def check() -> None:
        server = Server(max_running=4)
        one, two = server.ask("a", 1, count=2), server.ask("b", 2)
        for index, token in ((2, 50), (1, 51), (0, 52), (99, 53)):
            server.deliver(index, token)
        assert [(number, token.token_id) for number, token in drain_events(one)] == [(1, 51), (0, 52)]
        assert [(number, token.token_id) for number, token in drain_events(two)] == [(0, 50)]
        assert server.metrics.num_tokens == 3

    run(check)


def test_closing_a_call_frees_what_ran_and_drops_what_waited() -> None:
    async def check() -> None:
        server = Server(max_running=2)
        ticket = server.ask("a", 1, count=4)
        server.ask("b", 2)
        server.dispatcher.close(ticket)
        assert server.cancelled == [0, 1]
        assert server.added == [1, 1, 2], "the next one has a place at once"
        assert (server.dispatcher.num_running, server.dispatcher.num_waiting) == (1, 0)
        server.deliver(0, 5)
        assert drain_events(ticket) == [], "what was on its way has no reader"
        server.dispatcher.close(ticket)
        assert server.cancelled == [0, 1]

    run(check)


def test_a_choice_whose_text_has_ended_leaves_the_others_running() -> None:
    async def check() -> None:
        server = Server(max_running=2)
        ticket = server.ask("a", 1, count=2)
        server.ask("b", 2)
        server.dispatcher.end_choice(ticket, 0)
        server.dispatcher.end_choice(ticket, 0)
        assert (server.cancelled, server.added, ticket.num_open) == ([0], [1, 1, 2], 1)

    run(check)


def test_a_deadline_ends_a_call_that_runs_and_one_that_waits() -> None:
    async def check() -> None:
        server = Server(max_running=1)
        tickets = [server.ask("a", 1, seconds=0.05), server.ask("b", 2, seconds=0.05)]
        for ticket in tickets:
            error = await ticket.events.get()
            assert isinstance(error, ServiceError) and (error.status, error.code) == (504, "timeout")
        assert (server.dispatcher.num_running, server.dispatcher.num_waiting) == (0, 0)
        assert 0 in server.cancelled

    run(check)


def test_an_answer_that_is_complete_has_no_deadline_any_longer() -> None:
    async def check() -> None:
        server = Server()
        ticket = server.ask("a", 1, seconds=0.05)
        server.end(0)
        server.dispatcher.close(ticket)
        await asyncio.sleep(0.1)
        assert len(drain_events(ticket)) == 1

    run(check)


def test_draining_ends_when_all_is_answered_and_takes_nothing_new() -> None:
    async def check() -> None:
        server = Server(max_running=1)
        tickets = [server.ask("a", 1), server.ask("b", 2)]
        drained = asyncio.create_task(server.dispatcher.drain(LONG_SECONDS))
        await asyncio.sleep(0)
        assert server.dispatcher.is_draining
        with pytest.raises(ServiceError) as refused:
            server.ask("c", 3)
        assert (refused.value.status, refused.value.code) == (503, "draining")
        server.end(0)
        await asyncio.sleep(0.01)
        assert not drained.done() and server.added == [1, 2], "what waited is answered, too"
        server.end(1)
        await drained
        assert [len(drain_events(ticket)) for ticket in tickets] == [1, 1]

    run(check)


def test_draining_an_idle_server_ends_at_once() -> None:
    async def check() -> None:
        await Server().dispatcher.drain(LONG_SECONDS)

    run(check)


def test_draining_breaks_off_what_takes_too_long() -> None:
    async def check() -> None:
        server = Server(max_running=1)
        tickets = [server.ask("a", 1), server.ask("b", 2, count=2)]
        await server.dispatcher.drain(0.05)
        assert [event.code for ticket in tickets for event in drain_events(ticket)] == ["ended", "ended"]
        assert (server.dispatcher.num_running, server.dispatcher.num_waiting) == (0, 0)

    run(check)


def test_the_end_of_all_calls_is_the_end_of_new_ones() -> None:
    async def check() -> None:
        server = Server(max_running=1)
        ticket = server.ask("a", 1)
        server.dispatcher.fail_all()
        assert [event.code for event in drain_events(ticket)] == ["ended"]
        with pytest.raises(ServiceError, match="shutting down"):
            server.ask("a", 1)

    run(check)


def test_given_up_sequences_end_their_whole_call_and_no_other() -> None:
    async def check() -> None:
        server = Server(max_running=3)
        bad, good = server.ask("a", 1, count=2), server.ask("b", 2)
        server.dispatcher.give_up([1, 77], 3)
        (error,) = drain_events(bad)
        assert isinstance(error, ServiceError) and (error.status, error.code) == (500, "ranks_failed") and "3 times" in str(error)
        assert drain_events(good) == [] and server.dispatcher.num_running == 1

    run(check)


def test_a_long_wait_is_told_to_those_who_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    async def check() -> None:
        now = 0.0
        monkeypatch.setattr("launcher.server.queue.time", SimpleNamespace(monotonic=lambda: now))  # not the clock of the event loop
        server = Server(max_running=1, max_waiting=1)
        told: list[int] = []
        for index in range(0, 60, 2):
            server.ask("a", 1, count=2)
            with pytest.raises(ServiceError) as refused:
                server.ask("a", 1)
            told.append(int(refused.value.headers["Retry-After"]))
            now += 30
            server.end(index, index + 1)
        assert told[0] < told[5] < told[-1] and 20 < told[-1] <= 30

    run(check)
