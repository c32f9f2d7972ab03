"""The one supervisor of a host: starts its ranks, watches them, restarts them after a failure, and ends them.

Runs in the thread that called it. What decides which rank failed first is in `launcher/supervision/rank_watch.py`, which nodes take part in
an attempt in `launcher/rendezvous/nodes_rendezvous.py`.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.host.loopback import find_free_port
from launcher.job.codec import read_task, write
from launcher.job.job import Job
from launcher.job.observer import RunObserver
from launcher.job.tasks import Program, Task
from launcher.rendezvous.nodes import Nodes
from launcher.supervision.event_receiver import EventReceiver
from launcher.supervision.node_consensus import RanksEnded
from launcher.supervision.rank_process import RankOrder, job_file
from launcher.supervision.rank_starter import RankHandle, RankStarter, StarterEndedError
from launcher.supervision.rank_watch import FirstFailure, RankWatch
from launcher.supervision.signals import GracefulStop
from parallel.progress import ProgressBoard

if TYPE_CHECKING:
    from launcher.rendezvous.nodes_rendezvous import NodeRendezvous

OnRestart = Callable[[int, str, float, Sequence[int]], None]
"""Receives the number of a restart, its cause, the time.time() of the failure, and the ranks of this host that load their weights again;
may raise CheckpointReplacedError."""
_POLL_SECONDS = 0.05
_SPARE_SECONDS = 10.0
"""How long a rank with loaded weights may take to notice that a peer has died: the longest time between two collectives."""
_SPARE_POLL_SECONDS = 0.005
_END_SECONDS = 5.0
"""How long killed ranks may take to end; the kernel may first have to finish a read for them."""
_NODES_SECONDS = 30.0
"""How long a node whose ranks have ended well waits for the others."""


class ObserverFailedError(Exception):
    """The observer raised an error, which the receiver keeps."""


class Supervisor:
    """The ranks of this host, over all attempts of a run."""

    def __init__(
        self,
        job: Job,
        nodes: Nodes,
        starter: RankStarter,
        watch: RankWatch,
        board: ProgressBoard,
        folder: Path,
        log_dir: Path,
        max_restarts: int,
        observer: RunObserver,
        on_restart: OnRestart,
        stop: GracefulStop,
        receiver: EventReceiver,
    ) -> None:
        self._job, self._nodes, self._starter, self._watch, self._board = job, nodes, starter, watch, board
        self._folder, self._log_dir, self._max_restarts = folder, log_dir, max_restarts
        self._observer, self._on_restart, self._stop, self._receiver = observer, on_restart, stop, receiver
        self.rendezvous: NodeRendezvous | None = None
        """Set for runs of several nodes."""
        self.attempt = -1
        self._first_rank = 0
        self._program_port: int | None = None

    def run(self) -> None:
        """Run until all ranks have ended well, on every node.

        Raises RanksEnded when a rank has failed and no restart is left, ObserverFailedError, StoppedError, CheckpointReplacedError, and
        the errors of the rendezvous. Ranks may be left then.
        """
        self._begin_attempt({})
        while True:
            failure = self._watch_attempt()
            if failure is None and not self._watch.living:
                if self.rendezvous is None or self.rendezvous.wait_for_end(_NODES_SECONDS):
                    return
            elif failure is not None and (self.attempt >= self._max_restarts or failure.is_input or not self._observer.may_restart()):
                raise RanksEnded
            self._begin_attempt(self._spare_ranks(failure))

    def raise_if_over(self) -> None:
        """Raise ObserverFailedError, or StoppedError if a signal has ended the run."""
        if self._receiver.error is not None:
            raise ObserverFailedError
        self._stop.raise_if_due()

    def end_ranks(self) -> None:
        """Kill all ranks of this host, and wait until they have ended."""
        self._watch.end()
        self._wait_for_ends(set(self._watch.living))

    def close(self) -> None:
        """End the process that starts the ranks, and what is left of them."""
        self._starter.close()

    def _spare_ranks(self, failure: FirstFailure | None) -> Mapping[int, RankHandle]:
        """Kill the ranks that cannot go on after a failure, and return those that wait for the next attempt with their weights."""
        watch = self._watch
        if failure is None or self.rendezvous is not None:
            self.end_ranks()
            return {}
        if failure.local_rank is not None:
            watch.end({failure.local_rank})  # it may be stuck
        deadline = time.monotonic() + _SPARE_SECONDS
        while True:
            waiting, keeping = watch.find_rejoining(), watch.find_keeping().difference({failure.local_rank})
            watch.end(set(watch.living) - keeping)
            if waiting >= keeping or time.monotonic() > deadline:
                break
            self._look(_SPARE_POLL_SECONDS)
            self.raise_if_over()
        rest = set(watch.living) - (waiting & keeping)
        watch.end(rest)
        self._wait_for_ends(rest)
        return {rank: handle for rank, handle in watch.living.items() if rank in waiting & keeping}

    def _wait_for_ends(self, ranks: set[int]) -> None:
        deadline = time.monotonic() + _END_SECONDS
        while ranks & set(self._watch.living) and time.monotonic() < deadline:
            self._look()

    def _begin_attempt(self, spared: Mapping[int, RankHandle]) -> None:
        """Start the ranks, except those that have been spared, which take part again."""
        failure = self._watch.failure
        self.attempt = self.rendezvous.next_attempt() if self.rendezvous else self.attempt + 1
        new = [rank for rank in range(self._nodes.local_workers) if rank not in spared]
        if self.attempt:
            self._on_restart(self.attempt, *self._describe(failure), [self._first_rank + rank for rank in new])
        self._board.reset()
        job = replace(self._job, task=self._share_task())
        job_file(self._folder, self.attempt).write_text(write(job), encoding="utf-8")
        self._first_rank = self.rendezvous.first_ranks[self._nodes.node_rank] if self.rendezvous else 0
        # Another one for each attempt: the process group of the failed one may still occupy its port.
        self._program_port = find_free_port() if isinstance(self._job.task, Program) else None
        try:
            handles = dict(spared)
            self._watch.follow(handles)
            for local_rank in spared:
                self._board.admit(local_rank, self.attempt)
            for local_rank in new:
                order = self._order(local_rank)
                handles[local_rank] = self._starter.start(order, self._open_log(order.rank), self.raise_if_over)
                self._watch.follow(handles)
        except StarterEndedError as error:
            self._watch.take_starter(error.end, error.words)

    def _watch_attempt(self) -> FirstFailure | None:
        """Return the first failure, or None when all ranks have ended well or another node has begun a new attempt."""
        while True:
            failure = self._look()
            self.raise_if_over()
            if failure is not None or not self._watch.living or (self.rendezvous is not None and self.rendezvous.is_behind()):
                return failure

    def _look(self, seconds: float = _POLL_SECONDS) -> FirstFailure | None:
        try:
            return self._watch.look(self._starter.wait(seconds))
        except StarterEndedError as error:
            self._watch.take_starter(error.end, error.words)
            self._starter.close()
            self._starter = RankStarter(preload=self._starter.preload)
            return self._watch.failure

    def _order(self, local_rank: int) -> RankOrder:
        return RankOrder(
            folder=str(self._folder),
            rank=self._first_rank + local_rank,
            local_rank=local_rank,
            world_size=self._job.world_size,
            local_world_size=self._nodes.local_workers,
            attempt=self.attempt,
            master_addr=self.rendezvous.address if self.rendezvous else None,
            master_port=self.rendezvous.port if self.rendezvous else None,
            program_port=self._program_port,
            cores=None if self._job.cores is None else self._job.cores[local_rank],
        )

    def _open_log(self, rank: int) -> Path:
        """Return the log of a rank, and keep that of its failed attempt."""
        log = self._log_dir / f"worker_{rank}.log"
        if self.attempt and log.exists():
            log.rename(self._log_dir / f"worker_{rank}.attempt_{self.attempt - 1}.log")
        return log

    def _describe(self, failure: FirstFailure | None) -> tuple[str, float]:
        if failure is None or failure.is_echo:
            return "a rank failed on another node", time.time()
        if failure.local_rank is None:
            return f"the process that starts the ranks failed ({failure.describe()})", failure.at_seconds
        return f"rank {self._first_rank + failure.local_rank} failed ({failure.describe()})", failure.at_seconds

    def _share_task(self) -> Task:
        """Return the first node's remaining work: only that node receives rank 0's events."""
        handler = self.rendezvous
        if handler is None:
            return self._observer.continue_task(self._job.task)
        key = f"task/{self.attempt}"
        if handler.node == 0:
            handler.share(key, write(self._observer.continue_task(self._job.task)))
        return read_task(handler.wait_for(key))
