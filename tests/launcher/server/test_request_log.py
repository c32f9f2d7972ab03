"""The log of a server: which requests are told at which level, and its throughput."""

import asyncio
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from launcher.server import request_log as server_log
from launcher.server.request_log import configure_log, describe_throughput, log_request, log_throughput

BUSY = {"tokens_per_second": 12.34, "prompt_tokens_per_second": 5.0, "running": 2, "waiting": 1, "blocks_used": 3, "blocks_total": 12}
IDLE = {**BUSY, "tokens_per_second": 0.0, "running": 0, "waiting": 0}


def _scope(path: str) -> dict[str, Any]:
    return {"path": path, "method": "GET", "client": ("10.0.0.7", 4242)}


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """The level of other tests comes back."""
    yield
    configure_log("warning")


@pytest.mark.parametrize(
    ("level", "paths"), [("info", ["/v1/models"]), ("debug", ["/v1/models", "/health", "/metrics"]), ("warning", [])], ids=str
)
def test_a_request_is_one_line_at_its_level(level: str, paths: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    configure_log(level)
    for path in ("/v1/models", "/health", "/metrics"):
        log_request(_scope(path), 200, 0.123)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[4].rstrip('"') for line in lines] == paths
    assert all(line.split()[2:4] == ["10.0.0.7", '"GET'] and line.endswith('" 200 0.12 s') for line in lines)


def test_a_path_cannot_begin_a_line_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    configure_log("info")
    log_request(_scope("/a\n12:00:00 INFO forged\x1b[2J"), 404, 0.0, "key 0")
    written = capsys.readouterr().err
    assert written.count("\n") == 1 and "\x1b" not in written and "key 0" in written


@pytest.mark.parametrize(("found", "lines"), [(BUSY, 1), (IDLE, 0)], ids=["busy", "idle"])
def test_throughput_is_told_while_there_is_work(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], found: dict[str, Any], lines: int
) -> None:
    sleeps: list[float] = []

    async def sleep(seconds: float) -> None:
        sleeps.append(seconds)
        if len(sleeps) > 1:
            raise asyncio.CancelledError

    monkeypatch.setattr(server_log.asyncio, "sleep", sleep)
    configure_log("info")
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(log_throughput(SimpleNamespace(describe=lambda: found)))  # type: ignore[arg-type]
    written = capsys.readouterr().err
    assert written.count("\n") == lines
    assert not lines or describe_throughput(found) in written
    assert sleeps[0] == 10.0


def test_the_line_names_speeds_queue_and_cache() -> None:
    assert describe_throughput(BUSY) == "decode 12.3 tokens/s, prefill 5.0 tokens/s, 2 running, 1 waiting, KV cache 25% used"
