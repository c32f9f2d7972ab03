"""One rank of a server: a request that cannot run ends alone."""

from collections import deque
from dataclasses import asdict
from typing import Any

import pytest
import torch

from launcher.worker.service import RankService
from model.engine.request import Request
from model.engine.sampling import SamplingParams
from parallel.collectives import IdentityCollectives
from parallel.errors import RequestError


class StrictEngine:
    """Takes requests of one token."""

    has_unfinished = False

    def __init__(self) -> None:
        self.taken: list[int] = []

    def add(self, request: Request) -> None:
        if len(request.prompt_ids) != 1:
            raise RequestError(f"prompt {request.index} is long")
        self.taken.append(request.index)


def describe(index: int, *ids: int, **changed: Any) -> dict[str, Any]:
    request = asdict(Request(index, ids, SamplingParams(max_new_tokens=1)))
    return {"do": "add", "request": {**request, "params": {**request["params"], **changed}}}


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (describe(7, 1, 2), "prompt 7 is long"),
        (describe(7, 1, top_p=0), "top_p is 0.0, but has to be above 0"),
        (describe(7, 1, max_new_tokens="many"), "Expected `int`"),
    ],
)
def test_a_request_that_cannot_run_is_refused_and_those_around_it_run(bad: dict[str, Any], said: str) -> None:
    engine: Any = StrictEngine()
    told: list[dict[str, Any]] = []
    inbox = deque([[describe(1, 5), bad, describe(2, 5)], [{"do": "end"}]])
    service = RankService(engine, IdentityCollectives(), torch.device("cpu"), lambda: 0, lambda wait: inbox.popleft(), told.append)
    service._reported = float("inf")
    service.run()
    assert engine.taken == [1, 2]
    (refusal,) = told
    assert (refusal["event"], refusal["index"]) == ("refused", 7) and said in refusal["message"]
