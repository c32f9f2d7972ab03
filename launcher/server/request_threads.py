"""Thread pools that parse, tokenize and validate requests off the event loop.

Large requests have a separate thread, so they delay each other but no small ones.
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
"""Maximum pending requests per pool, waiting or running; each holds its body."""


class RequestThreads:
    """The thread pools of one server."""

    def __init__(self) -> None:
        kinds = [(is_chat, is_large) for is_chat in (False, True) for is_large in (False, True)]
        self._pools = {kind: ThreadPoolExecutor(1 if kind[1] else _SMALL_THREADS, "requests") for kind in kinds}
        self._pending = dict.fromkeys(kinds, 0)

    async def run(self, body: bytes, work: Callable[[bytes], Result], *, is_chat: bool = False) -> Result:
        """Apply `work` to a request body in a thread. Raises ServiceError (503) if too many requests are pending, and any error of `work`.

        Chat requests have separate threads, so a slow template delays no completions.
        """
        kind = is_chat, len(body) > LARGE_BYTES
        if self._pending[kind] >= _MAX_PENDING:
            raise busy()
        loop = asyncio.get_running_loop()
        self._pending[kind] += 1

        def end(_: "Future[Result]") -> None:  # runs in the thread, even if the client has disconnected
            loop.call_soon_threadsafe(self._note_end, kind)

        future = self._pools[kind].submit(work, body)
        future.add_done_callback(end)
        return await asyncio.wrap_future(future)

    def _note_end(self, kind: tuple[bool, bool]) -> None:
        self._pending[kind] -= 1

    def close(self) -> None:
        """Start no further requests."""
        for pool in self._pools.values():
            pool.shutdown(wait=False, cancel_futures=True)
