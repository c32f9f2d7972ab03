"""The ranks that a user's program consists of: who they are, what they have to agree on, and their collectives.

Every rank has to load the same models and make the same calls in the same order. A rank that refuses its input tells the others.
"""

import json
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch

from launcher.host.cores import count_cores, share_cores
from launcher.job.job import Job
from launcher.job.messages import Command, Event, RankWarning
from launcher.rendezvous.errors import DifferentRunError
from launcher.rendezvous.placement import RankPlacement
from launcher.rendezvous.run_identity import compare_runs
from launcher.worker.collectives import connect
from launcher.worker.rank import Rank
from model.backends.registry import find_backend
from parallel.errors import ConfigError, InputError, RunError
from parallel.progress import Progress
from parallel.store_waiting import wait_for_ranks
from parallel.torch_internals import PrefixStore, Store
from parallel.watched_collectives import WatchedCollectives

Result = TypeVar("Result")
ENDED_KEY = "ended"
"""Store key, set by the first rank that leaves the program: its number and the error that ended it, or an empty text, as JSON."""


class RankGroup:
    """The ranks of this program."""

    def __init__(
        self, launcher: str, seat: RankPlacement, store: Store | None, timeout_seconds: float, progress: Progress | None = None
    ) -> None:
        """`launcher` has started the ranks. `store` is shared by them; None for a single one. `timeout_seconds` limits the wait for a rank
        that makes no progress. `progress` is the line of a rank that tandem itself has started."""
        self.launcher, self._seat, self._store, self.timeout_seconds = launcher, seat, store, timeout_seconds
        self._progress = progress or Progress()
        self._num_agreements = 0

    @property
    def rank(self) -> int:
        """Rank of this process, from 0."""
        return self._seat.rank

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self._seat.world_size

    @property
    def local_rank(self) -> int:
        """Rank on this host, from 0."""
        return self._seat.local_rank

    @property
    def local_world_size(self) -> int:
        """Number of ranks on this host."""
        return len(self._seat.local_ranks)

    @property
    def seat(self) -> RankPlacement:
        """Placement of the ranks on hosts."""
        return self._seat

    def __repr__(self) -> str:
        return f"RankGroup(rank={self.rank}, world_size={self.world_size})"

    def agree(self, build: Callable[[], Result], describe: Callable[[Result], Mapping[str, Any]]) -> Result:
        """Run `build` on every rank and return its result if it succeeds on all and their descriptions are equal.

        Raises this rank's own error; ConfigError naming a rank whose input was refused, or ranks that differ; RunError naming a rank that
        has left the program.
        """
        number, self._num_agreements = self._num_agreements, self._num_agreements + 1
        result, error = None, None
        try:
            result = build()
            said: dict[str, Any] = {"run": dict(describe(result))}
        except Exception as caught:
            error, said = caught, {"error": str(caught) if isinstance(caught, InputError) else f"{type(caught).__name__}: {caught}"}
        program = self._store
        if program is not None:
            store = PrefixStore(f"agreement_{number}", program)
            store.set(f"said/{self.rank}", json.dumps(said))
            if error is not None:
                raise error
            keys = [f"said/{rank}" for rank in range(self.world_size)]

            def check() -> None:
                # In this order: a rank that ends after this agreement has seen every key.
                if program.check([ENDED_KEY]) and not store.check(keys):
                    rank, reason = json.loads(program.get(ENDED_KEY))
                    raise RunError(f"rank {rank} has ended{f': {reason}' if reason else ', but every rank has to make the same calls'}")

            wait_for_ranks(store, "said", range(self.world_size), self.timeout_seconds, "from_pretrained", check)
            self._compare([json.loads(store.get(key)) for key in keys])
        if error is not None:
            raise error
        assert result is not None
        return result

    def _compare(self, said: list[dict[str, Any]]) -> None:
        for rank, one in enumerate(said):
            if "error" in one:
                raise ConfigError(f"rank {rank} cannot load the model: {one['error']}")
        for rank, one in enumerate(said):
            try:
                compare_runs(f"rank {rank}", one["run"], f"rank {self.rank}", said[self.rank]["run"])
            except DifferentRunError as error:
                raise ConfigError(f"{error}; every rank has to load the same models in the same order") from None

    def open_rank(self, job: Job, warn: Callable[[str], None]) -> Rank:
        """Return the context of this rank for its next model: collectives, device and threads. Every rank has to call it in the same
        order."""
        started, seat = time.perf_counter(), self._seat
        threads = job.threads_per_rank or (share_cores(self.local_world_size) if seat.shares_cores else count_cores())
        torch.set_num_threads(threads)
        device = find_backend(job.device).open_device(seat.local_rank)
        store = PrefixStore(f"collectives_{self._num_agreements}", self._store) if self._store is not None else None
        collectives = WatchedCollectives(connect(job, seat, store, self.timeout_seconds, device), self._progress)

        def emit(event: Event) -> None:
            if isinstance(event, RankWarning) and self.rank == 0:
                warn(event.message)

        # A line that nobody watches: a rank of a program does not take part in another attempt, even if it keeps its weights.
        return Rank(job, collectives, device, threads, started, emit, _hear_nothing, Progress(), seat)


def _hear_nothing(wait_seconds: float) -> list[Command]:
    """The program itself says what to do."""
    return []


_current: list[RankGroup] = []


def find_group() -> RankGroup | None:
    """Return the group that this process has joined, or None."""
    return _current[0] if _current else None


def set_group(group: RankGroup | None) -> None:
    """Set the group of this process."""
    _current[:] = [] if group is None else [group]


def describe_end() -> str:
    """Return the unhandled exception with which the program ends; an empty text if there is none."""
    error = getattr(sys, "last_value", None)
    if error is None:
        return ""
    return str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
