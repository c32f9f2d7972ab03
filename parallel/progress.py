"""How far every rank of a host has come, in memory that whoever watches them can read without their help.

A board is a file with one line a rank: how often it got on, what it is in, how many collectives it has entered, how long it was in
them. It tells even of a rank that was killed or stopped. Knows integers; not what watches, and not what ranks do.
"""

import ctypes
import mmap
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from parallel.collectives import Collectives
from parallel.shared_memory import SharedSlots, SharesSlots

OPERATIONS = ("starting", "loading", "computing", "gather_columns", "barrier", "done")
"""What a rank can be in, by the code on its line."""
_CODES = {name: code for code, name in enumerate(OPERATIONS)}
WAITING = ("gather_columns", "barrier")
"""Of these, the ones in which a rank waits for others."""

_WORDS = 8  # one 64-byte cache line a rank
_BEATS, _OPERATION, _ENTERED, _STOP, _GATHERED = range(5)


@dataclass(frozen=True, slots=True)
class Standing:
    """What one line says."""

    beats: int
    """How often the rank got on; only changes matter."""
    operation: str
    """A word of OPERATIONS."""
    entered: int
    """Collectives that it has entered: of ranks that wait for each other, the one with fewest holds up the rest."""


class ProgressBoard:
    """The lines of `num_ranks` ranks in a file that only this user can read."""

    def __init__(self, path: Path, num_ranks: int, *, create: bool = False) -> None:
        size = num_ranks * _WORDS * 8
        descriptor = os.open(path, os.O_RDWR | (os.O_CREAT | os.O_EXCL if create else 0), 0o600)
        try:
            if create:
                os.ftruncate(descriptor, size)
            self._memory = mmap.mmap(descriptor, size)
        finally:
            os.close(descriptor)
        self._words = memoryview(self._memory).cast("q")

    def line(self, index: int) -> memoryview:
        """The words of one rank, for `Progress`."""
        return self._words[index * _WORDS : (index + 1) * _WORDS]

    def read(self, index: int) -> Standing:
        """What the line of a rank says now."""
        words = self.line(index)
        return Standing(words[_BEATS], OPERATIONS[words[_OPERATION]], words[_ENTERED])

    def reset(self) -> None:
        """All lines as new: other processes take them over."""
        for word in range(len(self._words)):
            self._words[word] = 0

    def ask_to_stop(self, index: int) -> None:
        """Ask a rank to stop after what it is at."""
        self.line(index)[_STOP] = 1


class Progress:
    """One rank's own line."""

    def __init__(self, line: memoryview | None = None) -> None:
        self._line = memoryview(bytearray(_WORDS * 8)).cast("q") if line is None else line

    def beat(self) -> None:
        """This rank got on."""
        self._line[_BEATS] += 1

    def set_operation(self, operation: str) -> None:
        """This rank is in a word of OPERATIONS now."""
        self._line[_OPERATION] = _CODES[operation]
        self._line[_BEATS] += 1

    def add_gather(self, nanoseconds: int) -> None:
        """A gather took so long."""
        self._line[_GATHERED] += nanoseconds

    @property
    def gather_nanoseconds(self) -> int:
        """What all gathers took so far, waiting for the other ranks included."""
        return self._line[_GATHERED]

    def enter(self, operation: str) -> None:
        """This rank goes into a collective."""
        self._line[_ENTERED] += 1
        self.set_operation(operation)

    @property
    def addresses(self) -> tuple[int, int, int, int]:
        """Where beats, operation, entered collectives and their nanoseconds lie, for code that keeps them itself."""
        first = ctypes.addressof(ctypes.c_char.from_buffer(self._line))
        return first + 8 * _BEATS, first + 8 * _OPERATION, first + 8 * _ENTERED, first + 8 * _GATHERED

    @property
    def operation(self) -> str:
        """What this rank is in."""
        return OPERATIONS[self._line[_OPERATION]]

    @property
    def asked_to_stop(self) -> bool:
        """Whether this rank shall stop after what it is at."""
        return bool(self._line[_STOP])

    def ask_to_stop(self) -> None:
        """Have `asked_to_stop` say so from now on."""
        self._line[_STOP] = 1


class WatchedCollectives:
    """Any collectives, with this rank's line kept. A collective that fails leaves its name on the line."""

    def __init__(self, inner: Collectives, progress: Progress) -> None:
        self._inner, self._progress = inner, progress
        self.name, self.rank, self.world_size = inner.name, inner.rank, inner.world_size

    def gather_columns(self, local: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        """Join [rows, sizes[rank]] of every rank into [rows, sum(sizes)]."""
        self._progress.enter("gather_columns")
        started = time.monotonic_ns()
        whole = self._inner.gather_columns(local, sizes)
        self._progress.add_gather(time.monotonic_ns() - started)
        self._progress.set_operation("computing")
        return whole

    def share_slots(self) -> SharedSlots | None:
        """The inner ones' slots, with this rank's line."""
        slots = self._inner.share_slots() if isinstance(self._inner, SharesSlots) else None
        return (
            None
            if slots is None
            else replace(slots, line=self._progress.addresses, gathering=_CODES["gather_columns"], computing=_CODES["computing"])
        )

    def barrier(self) -> None:
        """Return when every rank has come here."""
        self._progress.enter("barrier")
        self._inner.barrier()
        self._progress.set_operation("computing")

    def beat(self) -> None:
        """Tell the watcher and the peers that this rank got on."""
        self._progress.beat()
        self._inner.beat()

    def close(self) -> None:
        """Let go of what the back holds."""
        self._inner.close()
