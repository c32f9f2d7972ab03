"""The parent side of an LLM's ranks: how many sequences they receive, cancellation, and what a failure leaves."""

import pytest

from launcher.job.messages import Add, Cancel, Command, Failures, Loading, RankWarning, Refused, Serving, Tokens
from launcher.job.tasks import Serve
from launcher.server import engine_messages
from launcher.server.engine_messages import Notice, Ready, SequenceFailed, Token
from launcher.server.inflight_requests import MAX_FAILURES
from launcher.server.local_engine import LocalEngine
from model.engine.events import SequenceFailure, TokenEvent
from model.engine.request import Request
from model.engine.sampling_params import SamplingParams

TASK = Serve(requests=(), num_blocks=8, prefill_tokens=16)
READY = Serving(
    world_size=2,
    threads_per_rank=1,
    device="cpu",
    dtype="float32",
    quantization="none",
    kernel="torch",
    collectives="shm",
    memory_bytes_per_second=1.0,
    hosts=("here", "here"),
    pids=(10, 11),
)


class Ranks:
    """An engine of two concurrent sequences, with what it sends in both directions."""

    def __init__(self) -> None:
        self.told: list[Notice] = []
        self.sent: list[Command] = []
        self.loaded: list[tuple[int, int]] = []
        self.engine = LocalEngine(2, self.told.append, lambda done, total: self.loaded.append((done, total)))

    def begin(self) -> Serve:
        """Begin an attempt; returns its task."""
        self.sent.clear()
        task = self.engine.continue_task(TASK)
        self.engine.connect(self.sent.append)
        self.engine.on_event(READY)
        assert isinstance(task, Serve)
        return task

    def give(self, index: int, position: int, reason: str | None = None) -> None:
        """One token of rank 0."""
        self.engine.on_event(
            Tokens((TokenEvent(index=index, position=position, token_id=40 + position, logprob=None, finish_reason=reason),))
        )

    @property
    def added(self) -> list[int]:
        return [command.request.index for command in self.sent if isinstance(command, Add)]


@pytest.fixture
def ranks() -> Ranks:
    return Ranks()


def ask(*indices: int) -> list[Request]:
    return [Request(index, (1, 2), SamplingParams(max_new_tokens=9)) for index in indices]


def test_the_ranks_receive_as_many_sequences_as_they_run_in_order(ranks: Ranks) -> None:
    ranks.begin()
    ranks.engine.submit(ask(0, 1, 2, 3))
    assert ranks.added == [0, 1] and ranks.told == [Ready([10, 11])]
    ranks.give(1, 0, "eos")
    assert ranks.added == [0, 1, 2]
    assert ranks.told[1:] == [engine_messages.Tokens([Token(1, 40, "eos", None, ())])]
    ranks.engine.on_event(Failures((SequenceFailure(0, 0, "not finite"),)))
    ranks.engine.on_event(Refused(2, "too long"))
    assert ranks.added == [0, 1, 2, 3]
    assert ranks.told[2:] == [SequenceFailed(0, "not finite"), SequenceFailed(2, "too long")]


def test_cancelled_sequences_make_room(ranks: Ranks) -> None:
    ranks.begin()
    ranks.engine.submit(ask(0, 1, 2, 3, 4))
    ranks.engine.cancel([0, 3, 77])
    assert [command for command in ranks.sent if isinstance(command, Cancel)] == [Cancel(0)] and ranks.added == [0, 1, 2]
    ranks.give(1, 0, "length")
    assert ranks.added == [0, 1, 2, 4]
    ranks.give(0, 0)
    assert len(ranks.told) == 2, "a token of a cancelled sequence is dropped"


def test_running_sequences_resume_after_a_failure_and_waiting_ones_are_not_blamed(ranks: Ranks) -> None:
    ranks.begin()
    ranks.engine.submit(ask(0, 1, 2))
    ranks.give(0, 0)
    for _ in range(MAX_FAILURES - 1):
        ranks.engine.note_failure("killed", 0.0)
        task = ranks.begin()
        assert (task.requests[0].index, task.requests[0].resumed_ids) == (0, (40,))
    ranks.engine.note_failure("killed", 0.0)
    words = "the ranks failed 3 times while this request ran, without a token in between; it was abandoned"
    assert SequenceFailed(0, words) in ranks.told and SequenceFailed(2, words) not in ranks.told
    assert 2 in [request.index for request in ranks.begin().requests]


def test_three_failed_starts_in_a_row_are_the_last(ranks: Ranks) -> None:
    assert ranks.engine.may_restart()
    ranks.begin()
    ranks.engine.note_failure("killed", 0.0)
    ranks.engine.note_failure("killed", 0.0)
    assert ranks.engine.may_restart()
    ranks.engine.note_failure("killed", 0.0)
    assert not ranks.engine.may_restart()
    ranks.begin()
    assert ranks.engine.may_restart() and ranks.engine.ask_to_stop(15) == 0.0


def test_progress_and_warnings_are_shown(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    warned: list[str] = []
    monkeypatch.setattr(ranks.engine, "warn", warned.append)
    ranks.engine.on_event(Loading(1, 2))
    ranks.engine.on_event(RankWarning("slow"))
    assert (ranks.loaded, warned, ranks.told) == ([(1, 2)], ["slow"], [])
