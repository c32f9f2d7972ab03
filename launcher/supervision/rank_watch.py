"""Watches the ranks of this host: detects the first that fails or blocks the others, and kills the rest at once.

Runs as a thread of the parent next to the elastic agent, which starts and restarts processes; this module establishes the order of
failures. Knows nothing of other hosts.
"""

import os
import signal
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from launcher.supervision.rank_failure import RankFailure, read_failure
from parallel.observed_time import ObservedTime
from parallel.process_ends import find_ended
from parallel.progress import WAITING, ProgressBoard

_POLL_SECONDS = 0.05
_STACK_SECONDS = 1.0
"""How long a stuck rank may take to write its stack."""
_START_SECONDS = 60.0
"""Before its first report a rank imports PyTorch, which must not trigger --timeout."""
STACK_SIGNAL = signal.SIGUSR1
"""Signal on which a rank writes its stack."""
_STOPPED_STATES = ("T", "t")


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstFailure:
    """How the first of the ranks on this host failed."""

    local_rank: int
    pid: int
    exit_code: int | None
    """None if it was terminated by a signal, or has not exited."""
    signal: str | None
    """The signal that terminated or stopped it."""
    account: RankFailure | None
    """The rank's own record of the failure."""
    stuck: str | None
    """Why a rank that did not exit by itself was killed."""
    stack: str | None
    """Stack of a rank that was stuck or crashed."""
    waiting: Mapping[int, str]
    """The current operation of each other rank of this host, by local rank."""
    at_seconds: float
    """time.time() of the failure."""

    def with_exit_code(self, code: int) -> "FirstFailure":
        """Fill in the exit code that the agent read, negative for a signal, if the agent noticed before the watch."""
        if self.exit_code is not None or self.signal is not None or self.stuck is not None:
            return self
        return replace(self, exit_code=code if code >= 0 else None, signal=signal.Signals(-code).name if code < 0 else None)

    def describe(self) -> str:
        """Describe the failure in a few words."""
        said = self.account.exception.splitlines()[0] if self.account and self.account.exception else None
        return self.stuck or said or (f"ended by {self.signal}" if self.signal else f"ended with exit code {self.exit_code}")

    @property
    def is_input(self) -> bool:
        """Whether the checkpoint or a setting is at fault, so that a restart cannot help."""
        return self.account is not None and self.account.is_input

    @property
    def is_echo(self) -> bool:
        """Whether the rank failed only because one elsewhere had."""
        return self.account is not None and self.account.is_echo


def error_file(folder: Path, attempt: int, local_rank: int) -> Path:
    """Path of a rank's RankFailure."""
    return folder / f"error_{attempt}_{local_rank}.json"


def stack_file(folder: Path, attempt: int, local_rank: int) -> Path:
    """Path of a rank's stack, written on STACK_SIGNAL and on a crash."""
    return folder / f"stack_{attempt}_{local_rank}.txt"


class RankWatch(threading.Thread):
    """Watch thread for all attempts; `follow` sets the processes of each."""

    def __init__(self, board: ProgressBoard, folder: Path, timeout_seconds: float) -> None:
        super().__init__(daemon=True, name="rank watch")
        self._board, self._folder, self._timeout_seconds = board, folder, timeout_seconds
        self._lock, self._clock = threading.Lock(), ObservedTime()
        self._closed = threading.Event()
        self._attempt = 0
        self._pids: dict[int, int] = {}
        self._descriptors: dict[int, int] = {}
        self._last: dict[int, tuple[int, float]] = {}
        self._failure: FirstFailure | None = None
        self._is_ending = False
        self._unread: int | None = None

    def follow(self, attempt: int, pids: Mapping[int, int]) -> None:
        """Watch these processes, by local rank, from now on."""
        with self._lock:
            self._let_go()
            self._attempt, self._pids, self._failure, self._is_ending, self._unread = attempt, dict(pids), None, False, None
            now = self._clock.read()
            self._last = {rank: (-1, now) for rank in pids}
            for rank, pid in pids.items():
                self._descriptors[rank] = os.pidfd_open(pid)  # an exited child is a zombie and can still be opened

    def run(self) -> None:
        """Watch until `close`."""
        while not self._closed.is_set():
            with self._lock:
                descriptors = dict(self._descriptors)
            ended = find_ended(descriptors, _POLL_SECONDS)
            with self._lock:
                if descriptors == self._descriptors:
                    self._look(ended)

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()
        if self.is_alive():
            self.join()
        with self._lock:
            self._let_go()

    @property
    def failure(self) -> FirstFailure | None:
        """Return how the first rank of the current attempt failed, or None."""
        with self._lock:
            return self._failure

    def look_again(self) -> FirstFailure | None:
        """Poll once more and return the failure; the agent may notice before the thread does."""
        with self._lock:
            self._look(find_ended(self._descriptors))
            return self._failure

    def end_all(self) -> None:
        """Kill every rank of this host. They hold no state: everything worth keeping is in the parent or on disk."""
        with self._lock:
            self._is_ending = True
            self._kill(self._pids)

    def _let_go(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors, self._pids = {}, {}

    def _look(self, ended: set[int]) -> None:
        failed = []
        for rank in sorted(ended):
            code, number = _read_end(self._descriptors[rank])
            os.close(self._descriptors.pop(rank))
            account = read_failure(error_file(self._folder, self._attempt, rank))
            if code or number or account is not None:
                failed.append((rank, code, number, account))
            elif code is None:
                self._unread = rank
        if failed and self._unread is not None and not any(account for *_, account in failed):
            failed = [(self._unread, None, None, None)]  # the agent noticed first, and has since killed the other ranks
        if self._failure is not None or self._is_ending:
            return
        if failed:
            # Of several ranks that exited within one poll, prefer one that did not merely lose its peer.
            rank, code, number, account = min(failed, key=lambda entry: entry[3] is not None and entry[3].is_echo)
            self._take(rank, exit_code=code, number=number, account=account)
        elif (stuck := self._find_stuck()) is not None:
            self._take_stuck(*stuck)

    def _take(self, rank: int, *, exit_code: int | None, number: int | None, account: RankFailure | None, stuck: str | None = None) -> None:
        waiting = {other: self._board.read(other).operation for other in self._last if other != rank}
        stack = None
        with suppress(OSError):
            stack = stack_file(self._folder, self._attempt, rank).read_text(encoding="utf-8", errors="replace") or None
        self._failure = FirstFailure(
            local_rank=rank,
            pid=self._pids[rank],
            exit_code=exit_code,
            signal=None if number is None else signal.Signals(number).name,
            account=account,
            stuck=stuck,
            stack=stack,
            waiting=waiting,
            at_seconds=time.time(),
        )
        self._kill(self._pids)

    def _find_stuck(self) -> tuple[int, float, bool] | None:
        """Return a rank that blocks the others, the seconds since its last progress, and whether it was stopped."""
        now = self._clock.read()
        late: dict[int, float] = {}
        standings = {rank: self._board.read(rank) for rank in self._descriptors}
        for rank, standing in standings.items():
            beats, since = self._last[rank]
            if standing.beats != beats:
                self._last[rank] = (standing.beats, now)
            elif now - since > self._timeout_seconds:
                late[rank] = now - since
        if not late:
            return None
        stopped = [rank for rank in late if read_state(self._pids[rank]) in _STOPPED_STATES]
        if stopped:
            return stopped[0], late[stopped[0]], True
        furthest = max(standing.entered for standing in standings.values())
        for rank, seconds in late.items():
            standing = standings[rank]
            if standing.operation == "done" or (standing.operation == "starting" and seconds < max(_START_SECONDS, self._timeout_seconds)):
                continue
            if standing.operation not in WAITING or standing.entered < furthest:
                return rank, seconds, False
        return None

    def _take_stuck(self, rank: int, seconds: float, is_stopped: bool) -> None:
        operation = self._board.read(rank).operation
        if is_stopped:
            words = f"stopped (process state T) in {operation}: no progress for {seconds:.1f} s, --timeout is {self._timeout_seconds:g} s"
            self._take(rank, exit_code=None, number=signal.SIGSTOP, account=None, stuck=words)
            return
        stack = stack_file(self._folder, self._attempt, rank)
        deadline = time.monotonic() + _STACK_SECONDS
        with suppress(ProcessLookupError):
            os.kill(self._pids[rank], STACK_SIGNAL)
            while time.monotonic() < deadline and not (stack.exists() and stack.stat().st_size):
                time.sleep(0.02)
            time.sleep(0.02)  # wait for the rest of the stack
        words = f"no progress for {seconds:.1f} s in {operation}; a longer --timeout than {self._timeout_seconds:g} s allows slower steps"
        self._take(rank, exit_code=None, number=None, account=None, stuck=words)

    def _kill(self, pids: Mapping[int, int]) -> None:
        for rank in pids:
            if rank in self._descriptors:
                with suppress(ProcessLookupError):
                    signal.pidfd_send_signal(self._descriptors[rank], signal.SIGKILL)


def _read_end(descriptor: int) -> tuple[int | None, int | None]:
    """Return the exit code or signal of an exited child without reaping it, which is left to its parent."""
    try:
        end = os.waitid(os.P_PIDFD, descriptor, os.WEXITED | os.WNOWAIT | os.WNOHANG)
    except ChildProcessError:  # the agent has reaped it; its result has the exit code
        return None, None
    assert end is not None, "the descriptor said that it has ended"
    return (end.si_status, None) if end.si_code == os.CLD_EXITED else (None, end.si_status)


def read_state(pid: int) -> str:
    """Return a process's state letter, or an empty string if it is gone."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return ""
