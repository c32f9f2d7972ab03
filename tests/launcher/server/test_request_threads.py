"""Threads that read requests beside the event loop."""

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest

from launcher.server import request_threads
from launcher.server.errors import ServiceError
from launcher.server.request_threads import LARGE_BYTES, RequestThreads

SMALL, LARGE = b"x", b"x" * (LARGE_BYTES + 1)


def run(test: Callable[[RequestThreads, threading.Event], Any]) -> None:
    """Run a test on an event loop; the event lets work end that waits for it."""

    async def body() -> None:
        threads, gate = RequestThreads(), threading.Event()
        try:
            await test(threads, gate)
        finally:
            gate.set()
            threads.close()

    asyncio.run(body())


def test_results_and_errors_come_back() -> None:
    async def test(threads: RequestThreads, gate: threading.Event) -> None:
        assert await threads.run(SMALL, len) == 1
        with pytest.raises(ZeroDivisionError):
            await threads.run(LARGE, lambda body: 1 / 0)

    run(test)


def test_large_requests_delay_no_small_one() -> None:
    async def test(threads: RequestThreads, gate: threading.Event) -> None:
        large = [asyncio.create_task(threads.run(LARGE, lambda body: gate.wait(60))) for _ in range(5)]
        assert await threads.run(SMALL, len) == 1
        assert not any(task.done() for task in large)
        gate.set()
        assert await asyncio.gather(*large) == [True] * 5

    run(test)


def test_requests_beyond_a_number_are_refused_until_others_have_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_threads, "_MAX_PENDING", 5)

    async def test(threads: RequestThreads, gate: threading.Event) -> None:
        waiting = [asyncio.create_task(threads.run(SMALL, lambda body: gate.wait(60))) for _ in range(5)]
        await asyncio.sleep(0)
        with pytest.raises(ServiceError, match="busy") as refused:
            await threads.run(SMALL, len)
        assert refused.value.status == 503
        waiting[0].cancel()  # its client has gone, but its thread still works
        await asyncio.sleep(0)
        with pytest.raises(ServiceError, match="busy"):
            await threads.run(SMALL, len)
        gate.set()
        await asyncio.gather(*waiting, return_exceptions=True)
        await asyncio.sleep(0.05)
        assert await threads.run(SMALL, len) == 1

    run(test)
