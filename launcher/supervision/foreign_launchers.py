"""Runs a rank that an external launcher started (torchrun, Slurm, MPI, msrun): joins the other ranks and reports failures.

tandem has no parent process here, so the verdict comes from the rank that fails, or else from one that waits for it.
"""

import faulthandler
import os
import signal
import sys
import time
import traceback
from contextlib import suppress
from dataclasses import replace
from functools import partial
from math import ceil
from pathlib import Path
from queue import Empty, SimpleQueue
from types import FrameType

from launcher.environment.detection import LaunchEnvironment
from launcher.environment.device_transports import bind_device_transports
from launcher.job.codec import read_task, write
from launcher.job.job import Job
from launcher.job.messages import Command, Event
from launcher.job.observer import RunObserver
from launcher.rendezvous.errors import DifferentRunError
from launcher.rendezvous.launched_store import LaunchedStore
from launcher.rendezvous.placement import RankPlacement, find_alone, meet
from launcher.rendezvous.refused_input import RefusedByRankError
from launcher.rendezvous.run_identity import describe_run
from launcher.supervision.rank_failure import RankFailure
from launcher.supervision.rank_watch import STACK_SIGNAL, read_state
from launcher.supervision.signals import GRACE_SECONDS, StoppedError
from launcher.supervision.verdict import VERDICT_FILE, RanksFailedError, Verdict, shorten_stack
from launcher.worker.rank import StopRequested
from launcher.worker.run import run_rank
from parallel.errors import PeerError, RunError
from parallel.progress import Progress
from parallel.torch_internals import Store

_SECONDS_FOR_THE_CULPRIT = 2.0
"""A rank that lost a peer gives the peer this long to report the cause first."""
_STOPPING_FILE = ".stopping"
"""Written by rank 0 when it is asked to stop, so that the other ranks of its host do not take its exit for a failure."""
_STACK_SECONDS = 1.0


def join_ranks(environment: LaunchEnvironment, job: Job, log_dir: Path, observer: RunObserver) -> None:
    """Run as the rank that the environment specifies; rank 0's observer follows the run.

    Raises RanksFailedError with the verdict, RunError if another rank has reported it, StoppedError on SIGTERM and SIGINT.
    """
    rank = environment.rank
    assert rank is not None
    stopping = log_dir / _STOPPING_FILE
    if rank == 0:
        for left in (log_dir / VERDICT_FILE, stopping):
            left.unlink(missing_ok=True)
    progress = Progress()
    signals = _Signals(progress, rank, stopping, observer)
    signals.install()
    stack_path = log_dir / f"stack_{rank}.txt"
    with stack_path.open("w") as stack:
        faulthandler.enable(stack)
        faulthandler.register(STACK_SIGNAL, stack)
        joining = _Joining(environment, job, rank, progress)
        try:
            joining.run(observer)
            joining.announce_exit(0)
        except (DifferentRunError, RefusedByRankError):  # every rank reports these errors itself
            joining.announce_exit(2)
            raise
        except BaseException as error:
            # Launchers send SIGTERM to the other ranks when one fails: a rank that died before rank 0 stopped is the cause.
            if signals.number is not None and (not joining.find_dead() or (rank != 0 and stopping.exists())):
                joining.announce_exit(1)
                raise StoppedError(signals.number) from None
            if isinstance(error, StopRequested):
                peer = joining.find_dead()[0]
                error = PeerError(f"rank {peer} died while rank 0 continued", progress.operation, peer=peer, died=True)
            refusal = _explain(error, joining, log_dir)
            joining.announce_exit(1)
            raise refusal from None
        finally:
            faulthandler.unregister(STACK_SIGNAL)
            faulthandler.enable(sys.stderr)
    if not stack_path.stat().st_size:
        stack_path.unlink()


class _Joining:
    """The lifecycle of a rank, from connecting to the store to the end of its task."""

    def __init__(self, environment: LaunchEnvironment, job: Job, rank: int, progress: Progress) -> None:
        self.environment, self.job, self.rank, self.progress = environment, job, rank, progress
        self.seat: RankPlacement | None = None
        self._launched: LaunchedStore | None = None
        self._store: Store | None = None

    def run(self, observer: RunObserver) -> None:
        """Rendezvous with the other ranks and run."""
        environment, job = self.environment, self.job
        address, world_size = environment.master_addr, environment.world_size
        assert world_size is not None
        if world_size == 1:
            self.seat = find_alone()
        else:
            assert address is not None
            join_seconds = job.join_seconds or job.timeout_seconds
            self._launched = LaunchedStore(environment, join_seconds)
            self._store = self._launched.store
            if self.rank == 0:
                self._store.set("task", write(job.task))
            self.seat = meet(self._store, self.rank, world_size, address, describe_run(job), join_seconds)
            bind_device_transports(job.device, self.seat.address)
            # Rank 0 knows what an earlier run has finished; on other hosts there may be no such file.
            job = replace(job, task=read_task(self._store.get("task")))
        said: SimpleQueue[Command] = SimpleQueue()
        if self.rank == 0:
            observer.connect(said.put)
        emit = observer.on_event if self.rank == 0 else _silent
        run_rank(job, self.seat, self._store, self.progress, emit, partial(_receive, said), wait_seconds=job.timeout_seconds)

    def find_dead(self) -> list[int]:
        """Return the ranks of this host whose processes have exited."""
        seat = self.seat
        return [rank for rank in seat.local_ranks if read_state(seat.pids[rank]) in ("", "Z", "X")] if seat else []

    def announce_exit(self, code: int) -> None:
        """Tell the store's host that this rank no longer needs the store; the host itself waits for the others."""
        if self._launched is not None:
            self._launched.announce_exit(code, waits=self.seat is not None or code == 2)


def _silent(event: Event) -> None:
    """Ranks above 0 report nothing."""


def _receive(said: "SimpleQueue[Command]", wait_seconds: float) -> list[Command]:
    """Return the pending commands of the observer in this process; waits up to `wait_seconds` for the first one."""
    commands: list[Command] = []
    with suppress(Empty):
        while True:
            commands.append(said.get(block=not commands and wait_seconds > 0, timeout=wait_seconds or None))
    return commands


class _Signals:
    """Handler for the launcher's SIGTERM or SIGINT: rank 0 finishes the current token, or what its observer still wants to finish; the
    other ranks continue until it has. A second signal exits at once."""

    def __init__(self, progress: Progress, rank: int, stopping: Path, observer: RunObserver) -> None:
        self._progress, self._rank, self._stopping, self._observer = progress, rank, stopping, observer
        self.number: int | None = None

    def install(self) -> None:
        """Install handlers for both signals; call from the main thread."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.number is not None:
            os._exit(128 + number)
        self.number = number
        seconds = self._observer.ask_to_stop(number)
        if self._rank == 0:
            self._stopping.touch()
            if seconds is None:
                self._progress.ask_to_stop()
        # A rank waiting for one that received no signal may never finish its token.
        signal.signal(signal.SIGALRM, lambda *_: os._exit(128 + number))
        signal.alarm(ceil(GRACE_SECONDS if seconds is None else seconds))


def _explain(error: BaseException, joining: _Joining, log_dir: Path) -> Exception:
    """Return the verdict on this rank or on the one it waited for, or an error referring to another rank's verdict."""
    account, rank, seat = RankFailure.of(error), joining.rank, joining.seat
    if not isinstance(error, RunError):
        traceback.print_exception(error)
    own_name = os.uname().nodename
    restarts = joining.environment.restart_count
    if not account.is_echo:
        verdict = Verdict(
            first_failed_rank=rank,
            host=own_name,
            pid=os.getpid(),
            exit_code=1,
            signal=None,
            exception=account.exception,
            traceback_tail=account.traceback_tail,
            restarts_used=restarts,
        )
        return _give(verdict, log_dir, rank, is_input=account.is_input)
    assert isinstance(error, PeerError)
    peer = error.peer
    number: str | None = None
    trace: str | None = None
    if not error.died and peer is not None and seat is not None:
        number, trace = _look_at(peer, seat, log_dir)
    # A rank of this host that died has either reported the cause already or never will.
    deadline = time.monotonic() + (0 if error.died else _SECONDS_FOR_THE_CULPRIT)
    while time.monotonic() < deadline and not (log_dir / VERDICT_FILE).exists():
        time.sleep(0.05)
    verdict = Verdict(
        first_failed_rank=peer,
        host=seat.host_names[peer] if seat and peer is not None else own_name,
        pid=seat.pids[peer] if seat and peer is not None else None,
        exit_code=None,
        signal=number,
        exception=account.exception,
        traceback_tail=trace,
        others_waiting_in={rank: error.operation},
        restarts_used=restarts,
    )
    return _give(verdict, log_dir, rank)


def _give(verdict: Verdict, log_dir: Path, rank: int, *, is_input: bool = False) -> Exception:
    if verdict.claim(log_dir):
        return RanksFailedError(verdict, is_input=is_input)
    return RunError(f"rank {rank} ended since another rank failed first: see {log_dir / VERDICT_FILE}")


def _look_at(peer: int, seat: RankPlacement, log_dir: Path) -> tuple[str | None, str | None]:
    """Return why a stuck rank of this host was stopped, or otherwise its stack."""
    if peer not in seat.local_ranks:
        return None, None
    pid = seat.pids[peer]
    if read_state(pid) in ("T", "t"):
        return "SIGSTOP", None
    path = log_dir / f"stack_{peer}.txt"
    deadline = time.monotonic() + _STACK_SECONDS
    with suppress(OSError):
        os.kill(pid, STACK_SIGNAL)
        while time.monotonic() < deadline and not path.stat().st_size:
            time.sleep(0.02)
        time.sleep(0.02)  # wait for the rest of the stack
        return None, shorten_stack(path.read_text(encoding="utf-8", errors="replace"))
    return None, None
