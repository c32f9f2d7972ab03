"""Wait for ranks through the key-value store, for as long as the missing ones signal that they are alive.

A store's own blocking calls have one fixed timeout, but loading takes as long as the disk does. A call to a store whose host has
vanished can block for minutes; the process that monitors the ranks has to handle that case.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

from torch.distributed import DistError

from parallel.errors import PeerError
from parallel.observed_time import ObservedTime
from parallel.torch_internals import Store

_POLL_SECONDS = 0.01
_LOOK_SECONDS = 0.1
_BEAT_SECONDS = 1.0


def _nothing() -> None:
    """Default: no additional check."""


def wait_for_ranks(
    store: Store, name: str, ranks: Iterable[int], timeout_seconds: float, operation: str, check: Callable[[], None] = _nothing
) -> None:
    """Wait until every rank has set the key `name/RANK`. `check` is called while waiting and may raise.

    Time in which this process was stopped does not count. Raises PeerError naming the first late rank when a rank has neither arrived
    nor signaled for `timeout_seconds`. Each rank is timed separately, so one that is loading does not hide one that hangs. Raises
    PeerError when the store's host is gone.
    """
    missing = list(ranks)
    wanted, clock = len(missing), ObservedTime()
    heard = dict.fromkeys(missing, 0.0)
    beats: dict[int, bytes] = {}
    next_look = 0.0
    with store_errors(operation):
        # One poll is a single message for all missing ranks; checking each rank takes several, so it is done less often.
        while missing and not store.check([f"{name}/{rank}" for rank in missing]):
            check()
            if clock.read() >= next_look:
                missing = [rank for rank in missing if not store.check([f"{name}/{rank}"])]
                for rank in missing:
                    if store.check([f"beat/{rank}"]) and (beat := store.get(f"beat/{rank}")) != beats.get(rank):
                        beats[rank], heard[rank] = beat, clock.read()
                late = [rank for rank in missing if clock.read() - heard[rank] > timeout_seconds]
                if late:
                    raise PeerError(
                        f"rank {late[0]} did not reach {operation} within {timeout_seconds:g} s, {wanted - len(missing)} of {wanted} "
                        "ranks did; a longer --timeout allows slower ranks",
                        operation,
                        peer=late[0],
                    )
                next_look = clock.read() + _LOOK_SECONDS
            time.sleep(_POLL_SECONDS)


@contextmanager
def store_errors(operation: str) -> Iterator[None]:
    """Convert the errors of an unreachable store to PeerError."""
    try:
        yield
    except DistError as error:
        reason = str(error).partition("\n")[0]  # drop the C++ stack trace
        raise PeerError(f"the store of the ranks no longer answers, its host has ended: {reason}", operation) from error


class StoreBarrier:
    """Successive barriers of `ranks`. `find_gone` returns the ranks whose processes are known to have exited."""

    def __init__(
        self, store: Store, rank: int, ranks: Sequence[int], timeout_seconds: float, find_gone: Callable[[], Iterable[int]]
    ) -> None:
        self._store, self._rank, self._ranks = store, rank, ranks
        self._timeout_seconds, self._find_gone = timeout_seconds, find_gone
        self._count = 0

    def wait(self) -> None:
        """Block until every rank has reached the barrier. Raises PeerError when a rank has died, and the errors of `wait_for_ranks`."""
        self._count += 1
        name = f"barrier_{self._count}"

        def check() -> None:
            for peer in self._find_gone():
                if not self._store.check([f"{name}/{peer}"]):  # otherwise it passed this barrier before it exited
                    raise PeerError(f"rank {peer} died while rank {self._rank} waited for it in barrier", "barrier", peer=peer, died=True)

        with store_errors("barrier"):
            self._store.set(f"{name}/{self._rank}", "")
        wait_for_ranks(self._store, name, self._ranks, self._timeout_seconds, "barrier", check)


class StoreBeats:
    """Liveness signals of one rank, for `wait_for_ranks`."""

    def __init__(self, store: Store, rank: int) -> None:
        self._store, self._rank, self._count, self._next = store, rank, 0, 0.0

    def beat(self) -> None:
        """Send a signal, at most once a second since each one is a message. Raises PeerError when the store's host is gone."""
        now = time.monotonic()
        if now >= self._next:
            self._next = now + _BEAT_SECONDS
            self._count += 1
            with store_errors("beat"):
                self._store.set(f"beat/{self._rank}", str(self._count))
