"""Threads that read, tokenize and validate requests, so that the event loop keeps answering others meanwhile.

Large requests have a thread of their own: they delay each other, and no small one.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from launcher.server.errors import busy

Result = TypeVar("Result")

LARGE_BYTES = 64 << 10
_SMALL_THREADS = 3
_MAX_PENDING = 256
"""Requests that wait for or run in the threads of one kind; each holds its body."""


class RequestThreads:
    """The threads of one server."""

    def __init__(self) -> None:
        kinds = [(is_chat, is_large) for is_chat in (False, True) for is_large in (False, True)]
        self._pools = {kind: ThreadPoolExecutor(1 if kind[1] else _SMALL_THREADS, "requests") for kind in kinds}
        self._pending = dict.fromkeys(kinds, 0)

    async def run(self, body: bytes, work: Callable[[bytes], Result], *, is_chat: bool = False) -> Result:
        """What `work` makes of a request's body. Raises ServiceError (503) when too many wait, and whatever `work` raises.

        Chats have threads of their own: a template that takes long delays no completion.
        """
        kind = is_chat, len(body) > LARGE_BYTES
        if self._pending[kind] >= _MAX_PENDING:
            raise busy()
        loop = asyncio.get_running_loop()
        self._pending[kind] += 1

        def end(_: "Future[Result]") -> None:  # in the thread, even if the client has gone
            loop.call_soon_threadsafe(self._note_end, kind)

        future = self._pools[kind].submit(work, body)
        future.add_done_callback(end)
        return await asyncio.wrap_future(future)

    def _note_end(self, kind: tuple[bool, bool]) -> None:
        self._pending[kind] -= 1

    def close(self) -> None:
        """Start no further request."""
        for pool in self._pools.values():
            pool.shutdown(wait=False, cancel_futures=True)
