"""A rank started by tandem's own parent: reads the job from the run's folder, and reports through the socket and the board in it."""

import faulthandler
import gc
import os
import signal
import sys
import time
import traceback
from dataclasses import replace
from multiprocessing.connection import Client, Connection
from pathlib import Path

from launcher.environment.detection import set_variables
from launcher.environment.device_transports import bind_device_transports
from launcher.job.codec import read_command, read_job, write
from launcher.job.messages import Command, Event
from launcher.rendezvous.key_value_store import connect_store, open_file_store
from launcher.rendezvous.placement import find_alone, meet
from launcher.supervision.rank_failure import RankFailure
from launcher.supervision.rank_process import BOARD_FILE, SOCKET_FILE, RankOrder, job_file, store_file
from launcher.supervision.rank_watch import STACK_SIGNAL, error_file, stack_file
from launcher.worker.rank import Kept, StopRequested
from launcher.worker.run import run_rank
from parallel.errors import PeerError
from parallel.observed_time import ObservedTime
from parallel.progress import Progress, ProgressBoard
from parallel.torch_internals import PrefixStore, Store

_POLL_SECONDS = 0.002
_REJOIN_SECONDS = 60.0
"""How long a rank that has lost a peer waits for the parent to begin another attempt."""
_SLACK_SECONDS = 15.0
"""Extra time a rank waits for a peer, so that the parent, which can identify the culprit, times out first."""


class _ParentLine:
    """Rank 0's connection to the parent; the other ranks report nothing and receive no commands."""

    def __init__(self, folder: Path, rank: int) -> None:
        self._connection: Connection | None = None if rank else Client(str(folder / SOCKET_FILE), "AF_UNIX")

    def emit(self, event: Event) -> None:
        """Send an event."""
        if self._connection is not None:
            self._connection.send_bytes(write(event).encode())

    def receive(self, wait_seconds: float) -> list[Command]:
        """Return the pending commands; waits up to `wait_seconds` for the first one."""
        commands: list[Command] = []
        while self._connection is not None and self._connection.poll(0.0 if commands else wait_seconds):
            commands.append(read_command(self._connection.recv_bytes()))
        return commands

    def close(self) -> None:
        """Close the connection; the parent has what was sent."""
        if self._connection is not None:
            self._connection.close()


def run_spawned_rank(order: RankOrder) -> None:
    """Run this rank; returns when it has ended well, and exits otherwise."""
    os.dup2(2, 1)  # standard error is the log file; results are sent through the socket
    folder, pid = Path(order.folder), os.getpid()
    error_file(folder, pid).unlink(missing_ok=True)  # of an earlier process with this number
    with stack_file(folder, pid).open("w") as stack:
        faulthandler.enable(stack)
        faulthandler.register(STACK_SIGNAL, stack)
        progress = Progress(ProgressBoard(folder / BOARD_FILE, order.local_world_size).line(order.local_rank))
        try:
            _run_attempts(order, folder, progress)
        except StopRequested:
            signal.pause()  # the parent has its results and kills all ranks
        except BaseException as error:
            traceback.print_exc()
            RankFailure.of(error).write(error_file(folder, pid))
            sys.stderr.flush()
            # Skip the interpreter's slow shutdown: peers and parent are waiting for this exit.
            os._exit(1)


def _run_attempts(order: RankOrder, folder: Path, progress: Progress) -> None:
    """Run one attempt after the other, for as long as this rank only loses peers and can go on with its weights."""
    kept = Kept()
    while True:
        try:
            return _run_attempt(order, folder, progress, kept)
        except PeerError as error:
            if kept.model is None or not error.died:
                raise
            lost = error.with_traceback(None)  # the frames hold the KV cache
            lost.__context__ = lost.__cause__ = None
        gc.collect()
        print(f"{lost}; waiting for the next attempt", file=sys.stderr, flush=True)
        order = _wait_for_attempt(order, progress, lost)


def _wait_for_attempt(order: RankOrder, progress: Progress, lost: PeerError) -> RankOrder:
    """Wait until the parent lets this rank into an attempt. Raises `lost` if it does not."""
    progress.note_rejoining()
    clock = ObservedTime()
    while (attempt := progress.admitted_attempt) <= order.attempt:
        if clock.read() > _REJOIN_SECONDS:
            raise lost
        time.sleep(_POLL_SECONDS)
    order = replace(order, attempt=attempt)
    set_variables(order.variables)
    return order


def _run_attempt(order: RankOrder, folder: Path, progress: Progress, kept: Kept) -> None:
    job = read_job(job_file(folder, order.attempt).read_text(encoding="utf-8"))
    wait_seconds = job.timeout_seconds + _SLACK_SECONDS
    if order.world_size == 1:
        seat, store = find_alone(), None
    else:
        store = _open_store(order, folder, wait_seconds)
        address = order.master_addr or "127.0.0.1"
        seat = meet(store, order.rank, order.world_size, address, {}, wait_seconds)  # the nodes have already compared their runs
        bind_device_transports(job.device, seat.address)
    line = _ParentLine(folder, order.rank)
    try:
        run_rank(job, seat, store, progress, line.emit, line.receive, wait_seconds=wait_seconds, cores=order.cores, kept=kept)
    except PeerError:
        line.close()  # the next attempt makes another
        raise


def _open_store(order: RankOrder, folder: Path, wait_seconds: float) -> Store:
    if order.master_addr is None or order.master_port is None:
        return open_file_store(store_file(folder, order.attempt), order.world_size)
    raw = connect_store(order.master_addr, order.master_port, wait_seconds)
    return PrefixStore(f"tandem/ranks_{order.attempt}", raw)
