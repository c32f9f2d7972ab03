"""`tandem serve` when things go wrong: killed ranks, requests that kill them, full queues, missing keys, and a signal."""

import itertools
import os
import resource
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.end_to_end.servers import SECONDS, Server, plant, wait_until

if TYPE_CHECKING:
    from tests.end_to_end.conftest import Checkpoints, Tandem

pytestmark = pytest.mark.slow

PROJECT_ROOT = Path(__file__).resolve().parents[2]
RANKS = ("--threads-per-rank", "1", "--dtype", "float32")
KEY = "a-key-of-this-test"
LONG = {"max_tokens": 2000, "ignore_eos": True, "temperature": 0}
POISON = (7, 7, 7)

POISONED = """
import os, signal, sys

if "launcher.supervision" in " ".join(sys.orig_argv):
    from model.engine.generation import Engine

    add, step, poisoned = Engine.add, Engine.step, []

    def add_and_note(self, request):
        if request.prompt_ids == {poison}:
            poisoned.append(request)
        return add(self, request)

    def step_or_die(self):
        if poisoned and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self)

    Engine.add, Engine.step = add_and_note, step_or_die
"""
"""Rank 1 dies in the first step of a certain prompt, each time that it comes."""


LIMITED = """
import resource, runpy, sys

resource.setrlimit(resource.RLIMIT_NOFILE, ({num_files}, {num_files}))
sys.argv[0] = "tandem"
runpy.run_module("launcher", run_name="__main__")
"""


@pytest.fixture
def many_files() -> Iterator[None]:
    """Lets this process open 1400 connections."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 1500:
        pytest.skip(f"the hard limit of open files is {hard}")
    if soft != resource.RLIM_INFINITY and soft < 1500:
        resource.setrlimit(resource.RLIMIT_NOFILE, (1500, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture(scope="module")
def server(tandem: "Tandem", checkpoints: "Checkpoints", tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of two ranks, the second of which dies of POISON."""
    paths = plant(tmp_path_factory.mktemp("poison"), POISONED.format(poison=POISON))
    server = Server(tandem, "--checkpoint", checkpoints.float, "--workers", "2", *RANKS, **paths)
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.end()


class Watch(threading.Thread):
    """Asks for the health of a server until it is told to end."""

    def __init__(self, server: Server) -> None:
        super().__init__(daemon=True)
        self._server, self._is_over = server, threading.Event()
        self.seen: list[tuple[int, str]] = []

    def run(self) -> None:
        while not self._is_over.wait(0.02):
            self.seen.append(self._server.health)

    def __enter__(self) -> "Watch":
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._is_over.set()
        self.join()


def read_text(events: Iterator[dict[str, Any]]) -> str:
    return "".join(event["choices"][0]["text"] for event in events)


@pytest.mark.parametrize("victim", [0, 1])
def test_streams_go_on_with_the_same_tokens_when_a_rank_is_killed(server: Server, victim: int) -> None:
    prompts = ("I love Beijing", "A llama", "Two riders")
    fields: dict[str, Any] = {"max_tokens": 300, "ignore_eos": True, "temperature": 1, "seed": 5}
    with ThreadPoolExecutor(3) as pool:
        expected = [
            answer["choices"][0]["text"] for answer in pool.map(lambda prompt: server.complete(prompt, logprobs=0, **fields), prompts)
        ]
    before = server.status["restarts"]
    with ExitStack() as stack, Watch(server) as watch, ThreadPoolExecutor(3) as pool:
        # With log-probabilities each token is an event.
        streams = [stack.enter_context(server.stream(prompt, logprobs=0, **fields)) for prompt in prompts]
        begun = [list(itertools.islice(stream, 20)) for stream in streams]
        os.kill(server.running.find_ranks()[victim], signal.SIGKILL)
        rest = list(pool.map(list, streams))
        wait_until(lambda: server.health == (200, "ok"), "ready again")
    assert (503, "recovering") in watch.seen and {word for _, word in watch.seen} <= {"ok", "recovering"}
    for first, last, text in zip(begun, rest, expected, strict=True):
        events = [*first, *last]
        assert len(events) == 300, "no token is missing, and none comes twice"
        assert read_text(iter(events)) == text
        assert events[-1]["choices"][0]["finish_reason"] == "length"
    status = server.status
    assert status["restarts"] == before + 1 and status["last_failure"] == f"rank {victim} failed (ended by SIGKILL)"
    assert f"tandem_restarts_total {before + 1:.1f}".encode() in server.ask("GET", "/metrics")[2]
    said = f"restart {before + 1} of 1000: rank {victim} reloads, then all in-flight requests resume"
    assert f"rank {victim} failed (ended by SIGKILL); {said}" in server.stderr
    server.wait_until_idle()


def test_a_request_that_kills_its_rank_is_given_up_and_those_beside_it_are_answered(server: Server) -> None:
    fields: dict[str, Any] = {"max_tokens": 200, "ignore_eos": True, "temperature": 0}
    expected = [server.complete(prompt, **fields)["choices"][0]["text"] for prompt in ("A llama", "I love")]
    before = server.status["restarts"]
    with server.stream("A llama", **fields) as stream, ThreadPoolExecutor(2) as pool:
        first = next(stream)
        poisoned = pool.submit(server.ask, "POST", "/v1/completions", {"prompt": POISON, **fields})
        wait_until(lambda: server.status["restarts"] > before, "the first failure")
        beside = pool.submit(server.complete, "I love", **fields)
        assert first["choices"][0]["text"] + read_text(stream) == expected[0]
        status, _, answer = poisoned.result(SECONDS)
        assert (status, answer["error"]["code"]) == (500, "ranks_failed") and "failed 3 times" in answer["error"]["message"]
        assert beside.result(SECONDS)["choices"][0]["text"] == expected[1]
    assert server.status["restarts"] == before + 3
    server.wait_until_ready()
    server.wait_until_idle()


@pytest.fixture(scope="module")
def small_server(tandem: "Tandem", checkpoints: "Checkpoints", tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One rank, one sequence at a time, one that may wait, and a key."""
    keys = tmp_path_factory.mktemp("keys") / "keys.txt"
    keys.write_text(f"# of this test\n\nanother\n{KEY}\n")
    options = (
        "--max-batch-size",
        "1",
        "--max-queue",
        "1",
        "--api-key-file",
        keys,
        "--drain",
        str(SECONDS),
        "--served-model-name",
        "own/name",
    )
    server = Server(tandem, "--checkpoint", checkpoints.float, "--workers", "1", *RANKS, *options, key=KEY)
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.end()


def test_without_a_key_nothing_but_health_and_page_is_answered(small_server: Server) -> None:
    for said in ("", "Bearer", "Bearer wrong", f"Basic {KEY}", f"Bearer {KEY}x"):
        status, _, answer = small_server.ask("GET", "/v1/models", authorization=said)
        assert (status, answer["error"]["code"]) == (401, "invalid_api_key")
        for path in ("/status", "/metrics", "/v1/nothing"):
            assert small_server.ask("GET", path, authorization=said)[0] == 401
        assert small_server.ask("GET", "/health", authorization=said)[0] == 200
        assert small_server.ask("GET", "/", authorization=said)[0] == 200
    for key in (KEY, "another"):
        assert small_server.ask("GET", "/v1/models", authorization=f"Bearer {key}")[0] == 200
    assert small_server.ask("GET", "/health", host="any.example")[0] == 200, "with a key any name may be used"
    assert [model.id for model in small_server.client.models.list().data] == ["own/name"]
    assert small_server.client.models.retrieve("own/name").id == "own/name"


def test_a_full_queue_refuses_with_a_time_to_try_again(small_server: Server) -> None:
    small_server.wait_until_idle()
    with ThreadPoolExecutor(1) as pool:
        with small_server.stream("a", **LONG) as running:
            next(running)
            waiting = pool.submit(small_server.complete, "b", max_tokens=1)
            wait_until(lambda: small_server.status["waiting"] == 1, "one that waits")
            status, headers, answer = small_server.ask("POST", "/v1/completions", {"prompt": "c", "max_tokens": 1})
            assert (status, answer["error"]["code"]) == (429, "queue_full")
            assert 1 <= int(headers["retry-after"]) <= 60
            assert small_server.ask("POST", "/v1/completions", {"prompt": "c", "n": 3})[0] == 400, "that will never fit"
        # The one that ran has no caller any longer, so the next one has its place.
        assert waiting.result(SECONDS)["usage"]["completion_tokens"] == 1
    small_server.wait_until_idle()


def test_sigterm_lets_running_answers_come_to_their_end_and_takes_no_new_ones(small_server: Server) -> None:
    """The last test of this server."""
    small_server.wait_until_idle()
    with small_server.stream("a", logprobs=0, **{**LONG, "max_tokens": 1000}) as running:
        first = next(running)
        small_server.running.process.send_signal(signal.SIGTERM)
        refusals = []

        def is_refused() -> bool:
            try:
                refusals.append(small_server.ask("POST", "/v1/completions", {"prompt": "b", "max_tokens": 1, "timeout": 0.01})[0])
            except ConnectionError:
                refusals.append(0)
            return refusals[-1] in (0, 503)

        wait_until(is_refused, "refused")
        events = [first, *running]
    assert len(events) == 1000 and events[-1]["choices"][0]["finish_reason"] == "length"
    assert small_server.running.process.wait(SECONDS) == 143
    assert small_server.running.wait_until_gone(10) == []
    assert "stopped by SIGTERM" in small_server.stderr and "Traceback" not in small_server.stderr


@pytest.mark.parametrize(("num_files", "num_connections"), [(1024, 1300), (96, 300)])
def test_idle_connections_leave_descriptors_for_a_restart(
    tandem: "Tandem", checkpoints: "Checkpoints", num_files: int, num_connections: int, many_files: None
) -> None:
    limited = (sys.executable, "-c", LIMITED.format(num_files=num_files))
    server = Server(tandem, "--checkpoint", checkpoints.float, "--workers", "2", *RANKS, module=limited[1:])
    try:
        server.wait_until_ready()
        expected = server.complete("I love", max_tokens=5, temperature=0)["choices"]
        with ExitStack() as stack:
            for _ in range(num_connections):
                stack.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=SECONDS))
            os.kill(server.running.find_ranks()[1], signal.SIGKILL)
            wait_until(lambda: "the ranks are back" in server.stderr, "the restart")
            server.wait_until_ready()
            assert server.complete("I love", max_tokens=5, temperature=0)["choices"] == expected
            assert len(os.listdir(f"/proc/{server.running.process.pid}/fd")) < num_files
        assert "Traceback" not in server.stderr and len(server.stderr) < 10_000
        server.running.process.send_signal(signal.SIGTERM)
        assert server.running.process.wait(SECONDS) == 143
    finally:
        server.end()
