"""Starts the ranks of a job on this host with PyTorch's elastic agent, and supervises them until they exit.

The agent starts and restarts processes and runs the rendezvous between nodes; the watch determines which rank failed first. This module
provides the job and log files, and combines the findings into one verdict.
"""

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from torch.distributed import DistError
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import LogsDest, LogsSpecs, SignalException

from launcher.host.control_groups import read_memory_group
from launcher.host.run_folder import open_run_folder
from launcher.job.codec import read_event, read_task, write
from launcher.job.job import Job
from launcher.job.messages import Command, Stopped
from launcher.job.observer import RunObserver
from launcher.job.tasks import Task
from launcher.rendezvous.key_value_store import StoreError
from launcher.rendezvous.nodes import Nodes
from launcher.rendezvous.nodes_rendezvous import NodeRendezvous, NodesError, RunOver
from launcher.rendezvous.run_identity import DifferentRunError, describe_run
from launcher.supervision.node_consensus import RanksEnded, agree, announce_stop, judge, refuse
from launcher.supervision.rank_process import BOARD_FILE, JOB_FILE, SOCKET_FILE
from launcher.supervision.rank_watch import RankWatch
from launcher.supervision.signals import GRACE_SECONDS, GracefulStop, StoppedError
from launcher.supervision.verdict import RanksFailedError
from model.checkpoint.fingerprint import CheckpointReplacedError
from parallel.progress import ProgressBoard

_HOME = str(Path(__file__).resolve().parents[2])
_START_RANK = (
    f"import sys; sys.path = [{_HOME!r}] * ({_HOME!r} not in sys.path) + [one for one in sys.path if one]; "
    "from launcher.supervision.rank_process import main; main()"
)
"""Unlike `python -m`, excludes the current directory, where a model.py would shadow our package."""
_SHUTDOWN_SECONDS = 5
_MONITOR_SECONDS = 0.1
_EXIT_BARRIER_SECONDS = 30.0


def spawn_ranks(
    job: Job,
    nodes: Nodes,
    log_dir: Path,
    max_restarts: int,
    observer: RunObserver,
    on_restart: Callable[[int, str, float], None],
) -> int:
    """Run `job` in new processes on this node; returns the number of restarts.

    `on_restart` receives the number of each restart, the cause, and the time.time() of the failure; it may raise CheckpointReplacedError,
    which becomes the verdict. Raises RanksFailedError with the verdict, DifferentRunError if nodes were started for different runs,
    StoppedError on SIGINT and SIGTERM. No rank is left running on return or on error.
    """
    # The agent's log messages would interleave with the results; the verdict has what matters of them.
    for name in logging.root.manager.loggerDict:
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    memory = read_memory_group()
    with open_run_folder() as folder:
        board = ProgressBoard(folder / BOARD_FILE, nodes.local_workers, create=True)
        watch = RankWatch(board, folder, job.timeout_seconds)

        def ask_to_stop(number: int) -> float:
            seconds = observer.ask_to_stop(number)
            if seconds is None:
                board.ask_to_stop(0)
            return GRACE_SECONDS if seconds is None else seconds

        stop = GracefulStop(ask_to_stop, observer.takes_signal)
        rendezvous: NodeRendezvous | None = None
        agent: _Agent | None = None
        with Listener(str(folder / SOCKET_FILE), "AF_UNIX") as listener, stop:
            receiver = _Receiver(listener, observer, stop)
            receiver.start()
            try:
                rendezvous = NodeRendezvous(
                    nodes.node_rank, nodes.num_nodes, nodes.master_addr, nodes.master_port, job.timeout_seconds, _greet(job, nodes)
                )
                agent = _Agent(job, nodes, rendezvous, watch, board, folder, log_dir, max_restarts, observer, on_restart)
                watch.start()
                result = agent.run()
                if result.is_failed():
                    raise RanksEnded(result.failures)
            except SignalException as error:
                if receiver.error is None:
                    number = stop.number or int(error.sigval)
                    announce_stop(rendezvous, number, nodes)
                    raise StoppedError(number) from None
            except DifferentRunError as error:
                assert rendezvous is not None, "nodes have met"
                refuse(error, rendezvous)
                raise
            except (RanksEnded, StoreError, NodesError, RunOver, DistError, CheckpointReplacedError) as error:
                watch.end_all()
                receiver.finish()
                verdict, is_echo = judge(error, watch, nodes, rendezvous, log_dir, memory)
                failure = watch.look_again()
                is_input = failure is not None and failure.is_input
                raise RanksFailedError(agree(verdict, is_echo, rendezvous), is_input=is_input) from None
            finally:
                watch.end_all()
                receiver.finish()
                watch.close()
                if rendezvous is not None:
                    rendezvous.shutdown()
        if receiver.error is not None:
            raise receiver.error
    return agent.num_restarts if agent else 0


class _Agent(LocalElasticAgent):
    """The elastic agent; passes each attempt's job and processes to the watch."""

    def __init__(
        self,
        job: Job,
        nodes: Nodes,
        rendezvous: NodeRendezvous,
        watch: RankWatch,
        board: ProgressBoard,
        folder: Path,
        log_dir: Path,
        max_restarts: int,
        observer: RunObserver,
        on_restart: Callable[[int, str, float], None],
    ) -> None:
        spec = WorkerSpec(
            role="rank",
            local_world_size=nodes.local_workers,
            entrypoint=sys.executable,
            args=("-c", _START_RANK, str(folder), str(os.getpid())),
            rdzv_handler=rendezvous,
            max_restarts=max_restarts,
            monitor_interval=_MONITOR_SECONDS,
        )
        logs = _RankLogs(log_dir, folder)
        super().__init__(spec, logs, exit_barrier_timeout=_EXIT_BARRIER_SECONDS, shutdown_timeout=_SHUTDOWN_SECONDS)
        self._job, self._logs, self._rendezvous_handler, self._watch, self._board = job, logs, rendezvous, watch, board
        self._folder, self._observer, self._on_restart = folder, observer, on_restart
        self.first_rank = 0
        self.num_restarts = 0

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        attempt = self._rendezvous_handler.attempt
        if attempt:
            self.num_restarts = attempt
            self._on_restart(attempt, *self._describe_failure())
        self.first_rank = worker_group.workers[0].global_rank
        self._logs.attempt = attempt
        self._board.reset()
        job = replace(self._job, task=self._share_task(attempt))
        (self._folder / JOB_FILE).write_text(write(job), encoding="utf-8")
        pids: dict[int, Any] = super()._start_workers(worker_group)
        self._watch.follow(attempt, pids)
        return pids

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        self._watch.look_again()  # before the agent reaps the exit codes and stops the other ranks
        result: RunResult = super()._monitor_workers(worker_group)
        if result.is_failed():
            failure = self._watch.look_again()
            if not self._observer.may_restart() or (failure is not None and failure.is_input):
                self._remaining_restarts = 0
        return result

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, timeout: int = 30) -> None:
        self._watch.end_all()  # a stopped rank would not handle SIGTERM
        super()._shutdown(death_sig, timeout)

    def _describe_failure(self) -> tuple[str, float]:
        failure = self._watch.look_again()
        if failure is None or failure.is_echo:
            return "a rank failed on another node", time.time()
        return f"rank {self.first_rank + failure.local_rank} failed ({failure.describe()})", failure.at_seconds

    def _share_task(self, attempt: int) -> Task:
        """Return the first node's remaining work: only that node receives rank 0's events."""
        handler = self._rendezvous_handler
        if handler.num_nodes == 1:
            return self._observer.continue_task(self._job.task)
        key = f"task/{attempt}"
        if handler.node == 0:
            handler.share(key, write(self._observer.continue_task(self._job.task)))
        return read_task(handler.wait_for(key))


class _RankLogs(LogsSpecs):
    """Writes standard error and output of each rank to worker_N.log; keeps the logs of failed attempts."""

    def __init__(self, log_dir: Path, folder: Path) -> None:
        super().__init__(str(log_dir))
        self.attempt = 0
        self._log_dir, self._folder = log_dir, folder

    @property
    def root_log_dir(self) -> str:
        """The log folder."""
        return str(self._log_dir)

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        """Set the files of one attempt; the agent calls this before starting its processes."""
        logs = {}
        for local_rank, env in envs.items():
            log = self._log_dir / f"worker_{env['RANK']}.log"
            if self.attempt and log.exists():
                log.rename(self._log_dir / f"worker_{env['RANK']}.attempt_{self.attempt - 1}.log")
            logs[local_rank] = str(log)
            # Attempts are counted across nodes, but an agent counts only those in which one of its own ranks failed.
            env["TORCHELASTIC_RESTART_COUNT"] = str(self.attempt)
        unused = dict.fromkeys(envs, str(self._folder / "unused"))
        return LogsDest(dict.fromkeys(envs, ""), logs, {}, {}, unused, unused[0], unused[0])


class _Receiver(threading.Thread):
    """Receives rank 0's events; a restarted rank reconnects."""

    def __init__(self, listener: Listener, observer: RunObserver, stop: GracefulStop) -> None:
        super().__init__(daemon=True)
        self._listener, self._observer, self._stopping = listener, observer, stop
        self.error: Exception | None = None
        self._finished = threading.Event()

    def run(self) -> None:
        """Run until `finish`, or until the parent closes the listener."""
        while not self._finished.is_set():
            try:
                connection = self._listener.accept()
            except OSError:
                return
            with connection:
                self._receive(connection)

    def finish(self) -> None:
        """Wait until all events have been handled. The ranks have exited, so their connection is closed."""
        if self._finished.is_set():
            return
        self._finished.set()
        with suppress(OSError):
            Client(self._listener.address).close()  # wakes `accept`
        self.join()

    def _receive(self, connection: Connection) -> None:
        # A rank in a long step does not read its socket; senders must not block on it.
        outbox: SimpleQueue[Command | None] = SimpleQueue()
        sender = threading.Thread(target=_send_all, args=(connection, outbox), daemon=True, name="to rank 0")
        sender.start()
        if not self._finished.is_set():
            self._observer.connect(outbox.put)
        try:
            self._hear(connection)
        finally:
            outbox.put(None)

    def _hear(self, connection: Connection) -> None:
        while True:
            try:
                event = read_event(connection.recv_bytes())
            except (EOFError, OSError):
                return
            if isinstance(event, Stopped):
                self._stopping.answer()
            elif self.error is None:
                try:
                    self._observer.on_event(event)
                except Exception as error:  # re-raised by the parent after the ranks have exited
                    self.error = error
                    self._stopping.end_now()


def _send_all(connection: Connection, outbox: "SimpleQueue[Command | None]") -> None:
    with suppress(OSError):  # a rank that has died does not listen; the watch knows
        while (command := outbox.get()) is not None:
            connection.send_bytes(write(command).encode())


def _greet(job: Job, nodes: Nodes) -> Mapping[str, Any]:
    """Return this node's identity for comparison; all but its number of ranks must match on every node."""
    return {**describe_run(job), "local_workers": nodes.local_workers}
