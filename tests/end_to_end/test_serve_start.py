"""How `tandem serve` starts, under torchrun too, and how it ends where it cannot: refusals, ranks that do not load, an early signal."""

import re
import signal
import socket
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.end_to_end.servers import SECONDS, Server, plant, wait_until

if TYPE_CHECKING:
    from tests.end_to_end.conftest import Checkpoints, Tandem

RANKS = ("--threads-per-rank", "1", "--dtype", "float32")


UNLOADABLE = """
import os, sys

if "launcher.supervision" in " ".join(sys.orig_argv):
    import launcher.worker.rank

    plain = launcher.worker.rank.load_model

    def load_model(*arguments, **options):
        if os.environ["RANK"] == "1":
            raise OSError(5, "Input/output error")
        return plain(*arguments, **options)

    launcher.worker.rank.load_model = load_model
"""


@pytest.mark.slow
def test_a_signal_while_loading_ends_a_server_soon(tandem: "Tandem", checkpoints: "Checkpoints") -> None:
    server = Server(tandem, "--checkpoint", checkpoints.float, "--workers", "1", *RANKS, "--drain", "1000")
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(server.ask, "POST", "/v1/completions", {"prompt": "a"})
        wait_until(lambda: server.status["running"] == 1, "a request that waits for the ranks")
        server.running.process.send_signal(signal.SIGINT)
        status, _, answer = waiting.result(SECONDS)
    assert (status, answer["error"]["code"]) == (503, "ended")
    assert server.running.process.wait(SECONDS) == 130
    assert server.running.wait_until_gone(10) == [] and "Traceback" not in server.stderr


@pytest.mark.slow
def test_a_server_whose_ranks_cannot_load_ends_with_a_verdict(tandem: "Tandem", checkpoints: "Checkpoints", tmp_path: Path) -> None:
    server = Server(tandem, "--checkpoint", checkpoints.float, "--workers", "2", *RANKS, **plant(tmp_path, UNLOADABLE))
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(server.ask, "POST", "/v1/completions", {"prompt": "a"})
        status, _, answer = waiting.result(SECONDS)
    assert answer["error"]["code"] in ("ranks_failed", "ended") and status in (500, 503)
    assert server.running.process.wait(SECONDS) == 1
    assert server.running.wait_until_gone(10) == []
    assert [f"restart {number} of 1000" in server.stderr for number in (1, 2, 3)] == [True, True, False]
    assert "tandem: rank 1 failed first" in server.stderr and "OSError: [Errno 5] Input/output error" in server.stderr
    assert (server.folder / "logs" / "verdict.json").is_file()


LISTENERS: list[socket.socket] = []


def _listen_first(folder: Path) -> tuple[str, ...]:
    listener = socket.create_server(("127.0.0.1", 0))
    LISTENERS.append(listener)
    return "--port", str(listener.getsockname()[1])


def _write_keys(text: str) -> Callable[[Path], tuple[str | Path, ...]]:
    def write(folder: Path) -> tuple[str | Path, ...]:
        (folder / "keys.txt").write_text(text)
        return "--api-key-file", folder / "keys.txt"

    return write


REFUSALS: dict[str, tuple[Callable[[Path], tuple[str | Path, ...]], str]] = {
    "other hosts without a key": (lambda _: ("--host", "0.0.0.0"), "needs an API key: give --api-key-file or --insecure"),
    "a name that looks like this host": (lambda _: ("--host", "127.evil.example"), "needs an API key"),
    "port in use": (_listen_first, r"cannot listen on 127\.0\.0\.1, port \d+: Address already in use"),
    "no such address": (lambda _: ("--host", "203.0.113.7", "--insecure"), r"cannot listen on 203\.0\.113\.7"),
    "missing key file": (lambda folder: ("--api-key-file", folder / "none"), "none does not exist"),
    "empty key file": (_write_keys("# nothing\n\n"), "holds no key"),
    "key with a blank": (_write_keys("two words\n"), "holds a key with whitespace"),
    "port": (lambda _: ("--port", "65536"), "--port is 65536, but has to be from 0"),
    "queue": (lambda _: ("--max-queue", "-1"), "--max-queue is -1, but has to be at least 0"),
    "request timeout": (lambda _: ("--request-timeout", "0"), "--request-timeout is 0.0, but has to be above 0"),
    "drain": (lambda _: ("--drain", "-1"), "--drain is -1.0, but has to be from 0 to 31536000 seconds"),
    "prefill tokens": (lambda _: ("--prefill-tokens", "15"), "--prefill-tokens is 15, but has to be from 16 to 512"),
    "body": (lambda _: ("--max-body-mb", "0"), "--max-body-mb is 0.0, but has to be from 0.001 to 1000"),
    "connections": (lambda _: ("--max-connections", "0"), "--max-connections is 0, but has to be at least 1"),
    "more connections than files": (
        lambda _: ("--max-connections", "99999"),
        r"the limit of open files is \d+, but --max-connections 99999",
    ),
    "connections of a client": (lambda _: ("--max-client-connections", "-5"), "--max-client-connections is -5, but has to be at least 1"),
    "requests of a client": (lambda _: ("--max-client-requests", "0"), "--max-client-requests is 0, but has to be at least 1"),
    **{
        f"{flag} {value}": (lambda _, flag=flag, value=value: (flag, value), f"{flag} is {value}, but has to be ")
        for flag in ("--request-timeout", "--drain", "--max-body-mb", "--timeout")
        for value in ("inf", "-inf", "nan")
    },
    "batch": (lambda _: ("--max-batch-size", "0"), "--max-batch-size is 0, but has to be at least 1"),
    "blocks": (lambda _: ("--num-blocks", "0"), "num_blocks is 0"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_cannot_be_served_is_refused_before_any_process_starts(refuse: Callable[..., None], name: str) -> None:
    make, words = REFUSALS[name]
    try:
        refuse(
            lambda checkpoints, folder: ("serve", "--checkpoint", checkpoints.float, "--workers", "2", "--port", "0", *make(folder)),
            [words],
            usage=False,
        )
    finally:
        while LISTENERS:
            LISTENERS.pop().close()


@pytest.mark.slow
def test_a_limit_of_open_files_that_holds_no_server_is_refused(tandem: "Tandem", checkpoints: "Checkpoints") -> None:
    command = [sys.executable, "-m", "launcher", "serve", "--checkpoint", checkpoints.float, "--workers", "2", "--port", "0"]
    result = tandem.run_command(["sh", "-c", 'ulimit -n 80; exec "$@"', "sh", *command])
    assert result.returncode == 2 and result.stdout == ""
    assert re.search(r"^tandem: the limit of open files is 80, but a server of 2 ranks needs \d+: raise it with ulimit -n$", result.stderr)


@pytest.mark.slow
def test_ranks_of_torchrun_serve_alike_and_come_to_an_end(tandem: "Tandem", checkpoints: "Checkpoints") -> None:
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "launcher")
    server = Server(tandem, "--checkpoint", checkpoints.float, *RANKS, module=torchrun)
    try:
        server.wait_until_ready()
        fields = {"max_tokens": 8, "ignore_eos": True, "temperature": 0}
        with ThreadPoolExecutor(2) as pool:
            answers = list(pool.map(lambda prompt: server.complete(prompt, **fields)["choices"][0]["text"], ("I love", "A llama")))
        options = ("--checkpoint", checkpoints.float, *RANKS, "--workers", "1", "--max-new-tokens", "8", "--ignore-eos")
        assert answers == [one["text"] for one in tandem.predict(*options, "--prompt", "I love", "--prompt", "A llama").records]
        with server.stream("a", logprobs=0, **{**fields, "max_tokens": 300}) as stream:
            first = next(stream)
            server.running.process.send_signal(signal.SIGTERM)
            assert len([first, *stream]) == 300, "the launcher's signal lets the answer come to its end"
        server.running.process.wait(SECONDS)
        assert server.running.wait_until_gone(10) == []
    finally:
        server.end()
