"""Watches the ranks of this host: detects the first that fails or blocks the others.

Part of the supervisor's loop, which passes it the ends of processes. Starts nothing, and knows nothing of other hosts.
"""

import os
import signal
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from launcher.supervision.rank_failure import RankFailure, read_failure
from launcher.supervision.rank_starter import RankEnd, RankHandle
from parallel.observed_time import ObservedTime
from parallel.process_ends import find_ended
from parallel.progress import WAITING, ProgressBoard

_KERNEL_SECONDS = 5.0
"""How long the kernel may take to end the ranks whose parent has ended."""
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

    local_rank: int | None
    """None if it was the process that starts the ranks."""
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


def error_file(folder: Path, pid: int) -> Path:
    """Path of a rank's RankFailure."""
    return folder / f"error_{pid}.json"


def stack_file(folder: Path, pid: int) -> Path:
    """Path of a rank's stack, written on STACK_SIGNAL and on a crash."""
    return folder / f"stack_{pid}.txt"


class RankWatch:
    """The ranks of this host; `follow` sets the processes of each attempt, by local rank."""

    def __init__(self, board: ProgressBoard, folder: Path, timeout_seconds: float) -> None:
        self._board, self._folder, self._timeout_seconds = board, folder, timeout_seconds
        self._clock = ObservedTime()
        self._ranks: dict[int, RankHandle] = {}
        self._living: dict[int, RankHandle] = {}
        self._last: dict[int, tuple[int, float]] = {}
        self._ended_well: dict[int, RankEnd] = {}
        self._is_ending = False
        self.failure: FirstFailure | None = None
        """How the first rank of the current attempt failed, or None."""

    def follow(self, ranks: Mapping[int, RankHandle]) -> None:
        """Watch these ranks from now on. Those that are watched already go on."""
        for rank, handle in self._ranks.items():
            if ranks.get(rank) != handle:
                os.close(handle.descriptor)
        now = self._clock.read()
        self._ranks, self._living, self._is_ending, self.failure = dict(ranks), dict(ranks), False, None
        self._last = {rank: (-1, now) for rank in ranks}
        self._ended_well = {}

    @property
    def living(self) -> Mapping[int, RankHandle]:
        """The ranks that have not ended, by local rank."""
        return self._living

    def look(self, ends: Sequence[RankEnd] = ()) -> FirstFailure | None:
        """Take the ends of processes since the last look, look for ranks that are stuck, and return the first failure."""
        failed = []
        for rank, handle in list(self._living.items()):
            end = next((end for end in ends if end.pid == handle.pid), None)
            if end is None:
                continue
            del self._living[rank]
            account = read_failure(error_file(self._folder, handle.pid))
            if end.exit_code or end.signal or account is not None:
                failed.append((rank, end, account))
            else:
                self._ended_well[rank] = end
        if self.failure is not None or self._is_ending:
            return self.failure
        if not failed and self._ended_well and self.find_rejoining():
            # It exited with 0, but the others still needed it.
            failed = [(rank, end, None) for rank, end in self._ended_well.items() if self._board.read(rank).operation != "done"]
        if failed:
            # Of several ranks that ended since the last look, prefer one that did not merely lose its peer.
            rank, end, account = min(failed, key=lambda entry: entry[2] is not None and entry[2].is_echo)
            self._take(rank, end, account)
        elif (stuck := self._find_stuck()) is not None:
            self._take_stuck(*stuck)
        return self.failure

    def take_starter(self, end: RankEnd, words: str) -> None:
        """Note that the process that starts the ranks has ended, and all ranks with it. `words` are the last it wrote."""
        if self.failure is None:
            self._take(None, end, stack=words or None)
        deadline = time.monotonic() + _KERNEL_SECONDS
        while self._living and time.monotonic() < deadline:
            for rank in find_ended({rank: handle.descriptor for rank, handle in self._living.items()}, 0.1):
                del self._living[rank]
        self._living = {}

    def find_keeping(self) -> set[int]:
        """Return the living ranks that have loaded their weights and can take part in the next attempt with them."""
        return {rank for rank in self._living if self._board.read(rank).keeps_weights}

    def find_rejoining(self) -> set[int]:
        """Return the living ranks that wait for the next attempt."""
        return {rank for rank in self._living if self._board.read(rank).is_rejoining}

    def end(self, ranks: Collection[int] | None = None) -> None:
        """Kill ranks of this host, by default all. They hold no state: everything worth keeping is in the parent or on disk."""
        self._is_ending |= ranks is None
        for rank, handle in self._living.items():
            if ranks is None or rank in ranks:
                with suppress(ProcessLookupError):
                    signal.pidfd_send_signal(handle.descriptor, signal.SIGKILL)

    def close(self) -> None:
        """Stop watching."""
        for handle in self._ranks.values():
            os.close(handle.descriptor)
        self._ranks, self._living = {}, {}

    def _take(
        self, rank: int | None, end: RankEnd, account: RankFailure | None = None, *, stuck: str | None = None, stack: str | None = None
    ) -> None:
        waiting = {other: self._board.read(other).operation for other in self._last if other != rank}
        with suppress(OSError):
            stack = stack_file(self._folder, end.pid).read_text(encoding="utf-8", errors="replace") or stack
        self.failure = FirstFailure(
            local_rank=rank,
            pid=end.pid,
            exit_code=end.exit_code,
            signal=None if end.signal is None else signal.Signals(end.signal).name,
            account=account,
            stuck=stuck,
            stack=stack,
            waiting=waiting,
            at_seconds=time.time(),
        )

    def _find_stuck(self) -> tuple[int, float, bool] | None:
        """Return a rank that blocks the others, the seconds since its last progress, and whether it was stopped."""
        now = self._clock.read()
        late: dict[int, float] = {}
        standings = {rank: self._board.read(rank) for rank in self._living}
        for rank, standing in standings.items():
            beats, since = self._last[rank]
            if standing.beats != beats:
                self._last[rank] = (standing.beats, now)
            elif now - since > self._timeout_seconds:
                late[rank] = now - since
        if not late:
            return None
        stopped = [rank for rank in late if read_state(self._ranks[rank].pid) in _STOPPED_STATES]
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
        operation, handle = self._board.read(rank).operation, self._ranks[rank]
        if is_stopped:
            words = f"stopped (process state T) in {operation}: no progress for {seconds:.1f} s, --timeout is {self._timeout_seconds:g} s"
            self._take(rank, RankEnd(pid=handle.pid, exit_code=None, signal=signal.SIGSTOP), stuck=words)
            return
        stack = stack_file(self._folder, handle.pid)
        deadline = time.monotonic() + _STACK_SECONDS
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(handle.descriptor, STACK_SIGNAL)
            while time.monotonic() < deadline and not (stack.exists() and stack.stat().st_size):
                time.sleep(0.02)
            time.sleep(0.02)  # wait for the rest of the stack
        words = f"no progress for {seconds:.1f} s in {operation}; a longer --timeout than {self._timeout_seconds:g} s allows slower steps"
        self._take(rank, RankEnd(pid=handle.pid, exit_code=None, signal=None), stuck=words)


def read_state(pid: int) -> str:
    """Return a process's state letter, or an empty string if it is gone."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return ""
