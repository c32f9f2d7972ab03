"""Starts the ranks of a job on this host with PyTorch's elastic agent, and watches them to the end.

The agent starts, watches, restarts and ends processes; this file gives it the job, the log files and a verdict.
"""

import json
import logging
import sys
import tempfile
import threading
import uuid
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

from torch.distributed.elastic.multiprocessing import LogsDest, LogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from launcher.job import Job
from launcher.rank_process import JOB_FILE, SOCKET_FILE
from launcher.verdict import Verdict, build_verdict
from parallel.errors import TandemError

_SHUTDOWN_SECONDS = 5
_MONITOR_SECONDS = 0.1


class RanksFailedError(TandemError):
    """The ranks failed and the restarts are used up."""

    def __init__(self, verdict: Verdict) -> None:
        super().__init__(verdict.describe())
        self.verdict = verdict


class StoppedError(TandemError):
    """A signal ended the run."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"stopped by signal {signal_number}")
        self.signal_number = signal_number


def spawn_ranks(
    job: Job, log_dir: Path, max_restarts: int, on_event: Callable[[dict[str, Any]], None], on_restart: Callable[[int], None]
) -> int:
    """Run `job` on new processes of this host; give the number of restarts that it took.

    `on_event` gets rank 0's events, `on_restart` the number of each restart. Raises RanksFailedError with the verdict,
    StoppedError on SIGINT and SIGTERM. When it returns or raises, no rank is left.
    """
    log_dir.mkdir(parents=True, exist_ok=True)
    log_dir.chmod(0o700)
    # The agent's own words would stand between the results; what matters of them is in the verdict.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory(prefix="tandem-") as name:
        folder = Path(name)
        (folder / JOB_FILE).write_text(job.to_json(), encoding="utf-8")
        logs = _RankLogs(log_dir, folder, on_restart)
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=job.world_size,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="127.0.0.1:0",
            local_addr="127.0.0.1",
            max_restarts=max_restarts,
            monitor_interval=_MONITOR_SECONDS,
            logs_specs=logs,
            shutdown_timeout=_SHUTDOWN_SECONDS,
        )
        with Listener(str(folder / SOCKET_FILE), "AF_UNIX") as listener:
            receiver = _Receiver(listener, on_event)
            receiver.start()
            try:
                elastic_launch(config, sys.executable)("-m", "launcher.rank_process", name)
            except ChildFailedError as error:
                raise RanksFailedError(build_verdict(error.failures, job.world_size, folder, log_dir, logs.restarts)) from None
            except SignalException as error:
                raise StoppedError(int(error.sigval)) from None
            receiver.finish()
        if receiver.error is not None:
            raise receiver.error
    return logs.restarts


class _RankLogs(LogsSpecs):
    """worker_N.log for standard error, to which a rank joins its standard output; the log of an attempt that failed is kept."""

    def __init__(self, log_dir: Path, folder: Path, on_restart: Callable[[int], None]) -> None:
        super().__init__(str(log_dir))
        self.restarts = 0
        self._log_dir, self._folder, self._on_restart = log_dir, folder, on_restart
        self._started = False

    @property
    def root_log_dir(self) -> str:
        """Where the logs are."""
        return str(self._log_dir)

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        """Name the files of one attempt; the agent asks before it starts the processes of each."""
        if self._started:
            self.restarts += 1
            self._on_restart(self.restarts)
        self._started = True
        errors, logs = {}, {}
        for rank, env in envs.items():
            log = self._log_dir / f"worker_{rank}.log"
            if self.restarts and log.exists():
                log.rename(self._log_dir / f"worker_{rank}.attempt_{self.restarts - 1}.log")
            logs[rank] = str(log)
            errors[rank] = env["TORCHELASTIC_ERROR_FILE"] = str(self._folder / f"error_{self.restarts}_{rank}.json")
        console = dict.fromkeys(envs, "")
        unused = str(self._folder / "unused")
        return LogsDest(console, logs, {}, {}, errors, unused, unused)


class _Receiver(threading.Thread):
    """Hands rank 0's events on; a rank that was restarted connects anew."""

    def __init__(self, listener: Listener, on_event: Callable[[dict[str, Any]], None]) -> None:
        super().__init__(daemon=True)
        self._listener, self._on_event = listener, on_event
        self.error: Exception | None = None
        self._finished = threading.Event()

    def run(self) -> None:
        """Until `finish`, or until the parent closes the listener."""
        while not self._finished.is_set():
            try:
                connection = self._listener.accept()
            except OSError:
                return
            with connection:
                self._receive(connection)

    def finish(self) -> None:
        """Return when all that was sent has been handed on: the ranks have ended, so their connection has."""
        self._finished.set()
        with suppress(OSError):
            Client(self._listener.address).close()  # wakes `accept`
        self.join()

    def _receive(self, connection: Connection) -> None:
        while True:
            try:
                event = json.loads(connection.recv_bytes())
            except (EOFError, OSError):
                return
            if self.error is None:
                try:
                    self._on_event(event)
                except Exception as error:  # raised again by the parent when the ranks have ended
                    self.error = error
