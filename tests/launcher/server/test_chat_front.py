"""The parent's side of a chat without ranks: answers, interrupts, and failures of ranks."""

import signal
import threading

import pytest

from launcher.job.messages import Add, Cancel, Command, End
from launcher.job.tasks import Serve
from launcher.server.chat_front import ChatEngineClient
from launcher.server.inflight_requests import MAX_FAILURES
from model.engine.request import Request
from model.engine.sampling_params import SamplingParams
from parallel.errors import RunError
from tests.launcher.server.rank_events import SERVING, tokens

TASK = Serve(requests=(), num_blocks=1, prefill_tokens=16)


class Chat:
    """A front whose ranks are this test."""

    def __init__(self, *, continues: bool = True) -> None:
        self.sent: list[Command] = []
        self.interrupts = 0
        self._continues = continues
        self.front = ChatEngineClient(2, self._interrupt)
        self.start()

    def start(self) -> tuple[Request, ...]:
        """The ranks are there, again; what they are given to do."""
        task = self.front.continue_task(TASK)
        assert isinstance(task, Serve)
        self.front.connect(self.sent.append)
        self.front.on_event(SERVING)
        return task.requests

    def say(self, index: int, position: int, token_id: int, reason: str | None = None) -> None:
        """Rank 0 has a token."""
        self.front.on_event(tokens(index, position, token_id, reason))

    def answer(self) -> "Answer":
        return Answer(self.front)

    def _interrupt(self) -> bool:
        self.interrupts += 1
        return self._continues


class Answer(threading.Thread):
    """Reads one answer, as the loop of the chat does."""

    def __init__(self, front: ChatEngineClient) -> None:
        super().__init__()
        self._front = front
        self.begun = threading.Event()
        self.token_ids: list[int] = []
        self.error: Exception | None = None
        self.start()
        assert self.begun.wait(10)

    def run(self) -> None:
        try:
            for token in self._front.answer(self._make):
                self.token_ids.append(token.token_id)
        except RunError as error:
            self.error = error

    def end(self) -> list[int]:
        """What came."""
        self.join(10)
        assert not self.is_alive()
        return self.token_ids

    def _make(self, index: int) -> Request:
        self.begun.set()
        return Request(index, (5, 6), SamplingParams(max_new_tokens=9))


def wait_for(chat: Chat, count: int) -> None:
    """The ranks have been told so much."""
    deadline = threading.Event()
    for _ in range(1000):
        if len(chat.sent) >= count:
            return
        deadline.wait(0.01)
    raise AssertionError(chat.sent)


def test_answers_come_one_after_the_other() -> None:
    chat = Chat()
    for index in range(2):
        answer = chat.answer()
        wait_for(chat, index + 1)
        last = chat.sent[-1]
        assert isinstance(last, Add) and last.request.index == index
        chat.say(index, 0, 7)
        chat.say(index, 1, 8, "eos")
        assert answer.end() == [7, 8]


def test_an_interrupt_stops_the_answer_alone() -> None:
    chat = Chat()
    answer = chat.answer()
    wait_for(chat, 1)
    chat.say(0, 0, 7)
    assert chat.front.takes_signal(signal.SIGINT)
    assert answer.end() == [7] and answer.error is None
    assert chat.sent[-1] == Cancel(0)
    assert chat.interrupts == 0
    assert not chat.front.takes_signal(signal.SIGTERM), "this one ends the program"


@pytest.mark.parametrize("continues", [True, False])
def test_an_interrupt_between_answers_is_the_loops_to_judge(continues: bool) -> None:
    chat = Chat(continues=continues)
    assert chat.front.takes_signal(signal.SIGINT) == continues
    assert chat.interrupts == 1


def test_an_interrupt_while_loading_ends_the_program() -> None:
    assert not ChatEngineClient(1, lambda: True).takes_signal(signal.SIGINT)


def test_a_restart_continues_the_answer_with_its_tokens() -> None:
    chat = Chat()
    answer = chat.answer()
    wait_for(chat, 1)
    chat.say(0, 0, 7)
    chat.front.note_failure("rank 1 failed", 0.0)
    (request,) = chat.start()
    assert (request.index, request.resumed_ids) == (0, (7,))
    chat.say(0, 0, 7)  # said again
    chat.say(0, 1, 8, "length")
    assert answer.end() == [7, 8]


def test_a_message_on_which_the_ranks_fail_again_and_again_is_given_up() -> None:
    chat = Chat()
    answer = chat.answer()
    wait_for(chat, 1)
    for _ in range(MAX_FAILURES):
        assert chat.front.may_restart()
        chat.front.note_failure("rank 1 failed", 0.0)
        requests = chat.start()
    assert requests == ()
    assert answer.end() == []
    assert "abandoned" in str(answer.error)


def test_starts_that_fail_one_after_the_other_end_it() -> None:
    chat, attempts = Chat(), 0
    while chat.front.may_restart():
        chat.front.note_failure("rank 0 failed", 0.0)
        attempts += 1
    assert attempts == 3


def test_the_end_is_told_to_the_ranks() -> None:
    chat = Chat()
    chat.front.end()
    assert chat.sent == [End()]
