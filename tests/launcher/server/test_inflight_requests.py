"""What the ranks of a server are told: at once, at a new start, and not at all."""

import pytest

from launcher.job.messages import Add, Cancel, Command, End
from launcher.server.inflight_requests import MAX_FAILURES, InflightRequests
from model.engine.choice import Choice
from model.engine.events import PromptScore, TokenEvent
from model.engine.request import Request
from model.engine.sampling_params import SamplingParams
from tests.launcher.server.rank_events import token

PARAMS = SamplingParams(max_new_tokens=9, logit_bias=((3, -2.5),), stop_token_ids=(4, 5))


def ask(index: int) -> Request:
    return Request(index, (1, 2, index), PARAMS)


class Ranks:
    """One attempt: what it was given when it started, and what it has been told since."""

    def __init__(self, journal: InflightRequests) -> None:
        self.journal = journal
        self.given = journal.list_unfinished()
        self.told: list[Command] = []

    def connect(self) -> "Ranks":
        self.journal.connect(self.told.append)
        return self

    @property
    def running(self) -> dict[int, Request]:
        """What these ranks run now."""
        requests = {request.index: request for request in self.given}
        for command in self.told:
            if isinstance(command, Add):
                assert command.request.index not in requests, "told twice"
                requests[command.request.index] = command.request
            elif isinstance(command, Cancel):
                requests.pop(command.index, None)
        return requests


@pytest.fixture
def journal() -> InflightRequests:
    return InflightRequests()


def test_ranks_are_told_at_once_and_read_what_was_asked(journal: InflightRequests) -> None:
    ranks = Ranks(journal).connect()
    journal.add(ask(0))
    journal.add(ask(1))
    journal.cancel(0)
    journal.cancel(5)
    assert ranks.running == {1: ask(1)}
    assert list(map(type, ranks.told)) == [Add, Add, Cancel]
    assert len(journal) == 1


def test_tokens_are_new_once(journal: InflightRequests) -> None:
    Ranks(journal).connect()
    journal.add(ask(0))
    journal.add(ask(1))
    new = journal.take([token(0, 0, 50), token(1, 0, 60), token(0, 0, 50), token(0, 1, 51)])
    assert [(index, one.token_id) for index, one in new] == [(0, 50), (1, 60), (0, 51)]
    assert journal.take([token(0, 0, 50), token(0, 1, 51)]) == []
    assert journal.take([token(7, 0, 1)]) == [], "nobody has asked for it, or nobody does any longer"


def test_log_probabilities_come_along(journal: InflightRequests) -> None:
    journal.add(ask(0))
    ((_, new),) = journal.take([TokenEvent(0, 50, -0.5, "eos", 0, ((50, -0.5), (51, -1.5)))])
    assert (new.finish_reason, new.logprob, new.top_logprobs) == ("eos", -0.5, ((50, -0.5), (51, -1.5)))


def test_what_has_ended_is_forgotten(journal: InflightRequests) -> None:
    journal.add(ask(0))
    journal.take([token(0, 0, 50, "length")])
    assert len(journal) == 0 and journal.list_unfinished() == ()
    assert journal.take([token(0, 1, 51)]) == []


def test_a_new_attempt_goes_on_with_the_tokens_that_are_known(journal: InflightRequests) -> None:
    Ranks(journal).connect()
    for index in range(3):
        journal.add(ask(index))
    journal.take([token(0, 0, 50), token(0, 1, 51), token(1, 0, 60), token(2, 0, 70, "eos")])
    assert journal.note_failure() == []
    again = Ranks(journal)
    assert {request.index: request.resumed_ids for request in again.given} == {0: (50, 51), 1: (60,)}
    again.connect()
    assert again.told == []
    # Last words of the first attempt, which the second one says again.
    new = journal.take([token(0, 2, 52)]) + journal.take([token(0, 2, 52), token(0, 3, 53)])
    assert [one.token_id for _, one in new] == [52, 53]


def test_what_comes_and_goes_while_no_ranks_listen_is_told_when_they_do(journal: InflightRequests) -> None:
    journal.add(ask(0))  # before the first ones have come
    first = Ranks(journal).connect()
    assert set(first.running) == {0}
    journal.add(ask(1))
    journal.note_failure()
    journal.add(ask(2))
    journal.cancel(0)
    second = Ranks(journal)
    journal.add(ask(3))
    journal.cancel(1)
    journal.add(ask(4))
    journal.cancel(4)
    second.connect()
    assert set(second.running) == {2, 3}
    journal.add(ask(5))
    assert set(second.running) == {2, 3, 5}
    assert set(first.running) == {0, 1}, "nothing is said to ranks that have failed"


def test_what_ended_by_last_words_is_not_gone_on_with(journal: InflightRequests) -> None:
    Ranks(journal).connect()
    journal.add(ask(0))
    journal.note_failure()
    again = Ranks(journal)
    assert [one.finish_reason for _, one in journal.take([token(0, 0, 50, "eos")])] == ["eos"]
    assert again.connect().running == {}


def test_an_attempt_that_never_listens_is_given_its_work_again(journal: InflightRequests) -> None:
    journal.add(ask(0))
    journal.add(ask(1))
    Ranks(journal)
    journal.cancel(1)
    journal.add(ask(2))
    journal.note_failure()
    again = Ranks(journal).connect()
    assert [request.index for request in again.given] == [0, 2] and again.told == []


def test_the_end_is_said_to_those_who_listen(journal: InflightRequests) -> None:
    journal.end()
    ranks = Ranks(journal).connect()
    journal.end()
    assert ranks.told == [End()]


def test_a_request_is_given_up_when_it_has_seen_too_many_failures_since_its_last_token(journal: InflightRequests) -> None:
    for index in (0, 1):
        journal.add(ask(index))
    for failure in range(1, MAX_FAILURES):
        assert journal.note_failure() == []
        Ranks(journal).connect()
        journal.take([token(1, failure - 1, 60 + failure)])
    assert journal.note_failure() == [0], "the other one got on between the failures"
    assert [request.index for request in Ranks(journal).given] == [1]


def test_a_token_makes_up_for_earlier_failures(journal: InflightRequests) -> None:
    journal.add(ask(0))
    for position in range(5):
        for _ in range(MAX_FAILURES - 1):
            assert journal.note_failure() == []
        Ranks(journal).connect()
        assert journal.take([token(0, position, 50)])


def test_suspects_run_one_at_a_time_until_the_one_that_fails_is_found(journal: InflightRequests) -> None:
    for index in range(4):
        journal.add(ask(index))
    journal.take([token(0, 0, 50)])
    assert journal.note_failure() == []
    journal.add(ask(4))
    assert journal.note_failure() == []
    ranks = Ranks(journal).connect()
    assert set(ranks.running) == {0, 4}, "one of those that saw every failure, and what came later"
    assert [request.resumed_ids for request in ranks.given] == [(50,), ()]
    journal.take([token(0, 1, 51)])
    assert set(ranks.running) == {0, 4, 1}
    journal.take([token(1, 0, 60, "eos")])
    assert set(ranks.running) == {0, 4, 1, 2}
    assert journal.note_failure() == [2], "the one that had come last"
    again = Ranks(journal).connect()
    assert set(again.running) == {0, 3}, "request 4 waits now, which has seen two failures"
    journal.take([token(3, 0, 70), token(4, 0, 80)])
    assert set(again.running) == {0, 3, 4}
    assert journal.note_failure() == []


def test_a_suspect_that_is_cancelled_makes_room_for_the_next(journal: InflightRequests) -> None:
    for index in range(4):
        journal.add(ask(index))
    for _ in range(MAX_FAILURES - 1):
        assert journal.note_failure() == []
    ranks = Ranks(journal)
    assert [request.index for request in ranks.given] == [0]
    journal.cancel(0)  # nobody listens yet
    journal.cancel(2)
    ranks.connect()
    assert set(ranks.running) == {1}
    journal.cancel(1)
    assert set(ranks.running) == {3}
    journal.take([token(3, 0, 70, "eos")])
    assert len(journal) == 0


def test_ranks_that_did_not_come_to_serve_have_not_failed_because_of_anything() -> None:
    journal = InflightRequests()
    journal.add(ask(0))
    for _ in range(5):
        assert journal.note_failure(served=False) == []
    assert journal.note_failure() == journal.note_failure() == []
    assert journal.note_failure() == [0]


def test_scores_of_a_prompt_are_given_once_however_often_ranks_start_again(journal: InflightRequests) -> None:
    def score(position: int) -> PromptScore:
        return PromptScore(0, position, Choice(70 + position, -float(position), ((5, -0.5),)))

    Ranks(journal).connect()
    journal.add(ask(0))
    first = journal.take_scores([score(1)])
    assert [(index, one.token_id, one.logprob, one.top_logprobs) for index, one in first] == [(0, 71, -1.0, ((5, -0.5),))]
    journal.note_failure()
    Ranks(journal).connect()
    assert [one.token_id for _, one in journal.take_scores([score(1), score(2)])] == [72]
    journal.cancel(0)
    assert journal.take_scores([score(3)]) == []
