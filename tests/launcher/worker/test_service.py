"""One rank of a server: a request that cannot run ends alone."""

from collections import deque
from typing import Any

import pytest

from launcher.job.messages import Add, Command, End, Event, Refused
from launcher.worker.service import RankService
from model.engine.request import Request
from model.engine.sampling_params import SamplingParams
from parallel.collectives import IdentityCollectives
from parallel.errors import RequestError


class StrictEngine:
    """Takes requests of one token; says of others what it is made with."""

    has_unfinished = False

    def __init__(self, error: Exception) -> None:
        self.taken: list[int] = []
        self._error = error

    def add(self, request: Request) -> None:
        if len(request.prompt_ids) != 1:
            raise self._error
        self.taken.append(request.index)


def ask(index: int, *ids: int) -> Add:
    return Add(Request(index, ids, SamplingParams(max_new_tokens=1)))


@pytest.mark.parametrize("error", [RequestError("prompt 7 is long"), TypeError("no such type"), OverflowError("too large")])
def test_a_request_that_cannot_run_is_refused_and_those_around_it_run(error: Exception) -> None:
    engine: Any = StrictEngine(error)
    told: list[Event] = []
    inbox = deque[list[Command]]([[ask(1, 5), ask(7, 1, 2), ask(2, 5)], [End()]])
    service = RankService(engine, IdentityCollectives(), lambda: 0, lambda wait: inbox.popleft(), told.append)
    service._reported = float("inf")
    service.run()
    assert engine.taken == [1, 2]
    assert told == [Refused(7, str(error))]
