"""Waiting for ranks by way of the key-value store: for as long as those that are missing show that they are at work.

A store's own blocking calls know one fixed time limit; ranks that load take as long as their disks do. Knows keys and ranks.
A call to a store whose host has vanished without a word can block for minutes: whoever watches the ranks has to see to that.
"""

import time
from collections.abc import Callable, Iterable

from torch.distributed import DistError
from torch.distributed.distributed_c10d import Store

from parallel.errors import PeerError

_POLL_SECONDS = 0.01
_BEAT_SECONDS = 1.0


def _nothing() -> None:
    """Waiters that look at nothing else."""


def wait_for_ranks(
    store: Store, name: str, ranks: Iterable[int], timeout_seconds: float, operation: str, check: Callable[[], None] = _nothing
) -> None:
    """Return when every rank has set the key `name/RANK`. `check` is called while waiting, and may raise.

    Raises PeerError, which names the first missing rank, when none of the missing has come or shown that for `timeout_seconds`.
    """
    missing, last = list(ranks), time.monotonic()
    wanted = len(missing)
    seen: dict[int, bytes] = {}
    try:
        while missing:
            if store.check([f"{name}/{missing[0]}"]):
                del missing[0]
                last = time.monotonic()
                continue
            time.sleep(_POLL_SECONDS)
            for rank in missing:
                if store.check([f"beat/{rank}"]) and (beat := store.get(f"beat/{rank}")) != seen.get(rank):
                    seen[rank], last = beat, time.monotonic()
            check()
            if time.monotonic() - last > timeout_seconds:
                here = wanted - sum(not store.check([f"{name}/{rank}"]) for rank in missing)
                raise PeerError(
                    f"rank {missing[0]} did not reach {operation} within {timeout_seconds:g} s, {here} of {wanted} ranks did; "
                    "a longer --timeout allows slower ranks",
                    operation,
                    peer=missing[0],
                )
    except DistError as error:
        raise PeerError(f"the store of the ranks no longer answers, its host has ended: {error}", operation, peer=None) from error


class StoreBeats:
    """One rank's signs of being at work, for `wait_for_ranks`."""

    def __init__(self, store: Store, rank: int) -> None:
        self._store, self._rank, self._count, self._next = store, rank, 0, 0.0

    def beat(self) -> None:
        """Show it; at most once a second, since every sign is a message."""
        now = time.monotonic()
        if now >= self._next:
            self._next = now + _BEAT_SECONDS
            self._count += 1
            self._store.set(f"beat/{self._rank}", str(self._count))
