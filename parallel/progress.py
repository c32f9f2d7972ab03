"""Progress of every rank of a host, in shared memory that a monitor can read without the ranks' cooperation.

A board is a file with one line per rank: its progress counter, its current operation, the number of collectives it has entered and the
time spent in them. It stays readable after a rank was killed or stopped.
"""

import ctypes
import mmap
import os
from dataclasses import dataclass
from pathlib import Path

OPERATIONS = ("starting", "loading", "computing", "gather_columns", "barrier", "done")
"""The operations of a rank, indexed by the code on its line."""
CODES = {name: code for code, name in enumerate(OPERATIONS)}
"""The code of each operation."""
WAITING = ("gather_columns", "barrier")
"""The operations in which a rank waits for others."""

_WORDS = 8  # one 64-byte cache line per rank
_BEATS, _OPERATION, _ENTERED, _STOP, _GATHERED, _ATTEMPT, _KEEPS, _REJOINS = range(8)


@dataclass(frozen=True, slots=True)
class Standing:
    """The contents of one line."""

    beats: int
    """Progress counter; only changes are significant."""
    operation: str
    """An entry of OPERATIONS."""
    entered: int
    """Number of collectives entered: of ranks that wait for each other, the one with the lowest count blocks the rest."""
    keeps_weights: bool
    """Whether the rank can take part in another attempt with the weights that it has loaded."""
    is_rejoining: bool
    """Whether it has lost a peer, in its last operation, and waits for that attempt."""


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
        """Return the line of one rank, for `Progress`."""
        return self._words[index * _WORDS : (index + 1) * _WORDS]

    def read(self, index: int) -> Standing:
        """Read the current contents of a rank's line."""
        words = self.line(index)
        return Standing(words[_BEATS], OPERATIONS[words[_OPERATION]], words[_ENTERED], bool(words[_KEEPS]), bool(words[_REJOINS]))

    def reset(self) -> None:
        """Reset all lines, for the processes of the next attempt."""
        for word in range(len(self._words)):
            self._words[word] = 0

    def ask_to_stop(self, index: int) -> None:
        """Ask a rank to stop after its current step."""
        self.line(index)[_STOP] = 1

    def admit(self, index: int, attempt: int) -> None:
        """Let a rank that is rejoining take part in this attempt."""
        self.line(index)[_ATTEMPT] = attempt


class Progress:
    """One rank's own line."""

    def __init__(self, line: memoryview | None = None) -> None:
        self._line = memoryview(bytearray(_WORDS * 8)).cast("q") if line is None else line

    def beat(self) -> None:
        """Record progress of this rank."""
        self._line[_BEATS] += 1

    def set_operation(self, operation: str) -> None:
        """Set the current operation, an entry of OPERATIONS."""
        self._line[_OPERATION] = CODES[operation]
        self._line[_BEATS] += 1

    def add_gather(self, nanoseconds: int) -> None:
        """Add the duration of a gather."""
        self._line[_GATHERED] += nanoseconds

    @property
    def gather_nanoseconds(self) -> int:
        """Total time spent in gathers, including the time waiting for other ranks."""
        return self._line[_GATHERED]

    def enter(self, operation: str) -> None:
        """Record that this rank enters a collective."""
        self._line[_ENTERED] += 1
        self.set_operation(operation)

    @property
    def addresses(self) -> tuple[int, int, int, int]:
        """Addresses of progress counter, operation, entered collectives and their nanoseconds, for native code that updates them itself."""
        first = ctypes.addressof(ctypes.c_char.from_buffer(self._line))
        return first + 8 * _BEATS, first + 8 * _OPERATION, first + 8 * _ENTERED, first + 8 * _GATHERED

    @property
    def operation(self) -> str:
        """The current operation of this rank."""
        return OPERATIONS[self._line[_OPERATION]]

    @property
    def asked_to_stop(self) -> bool:
        """Whether this rank has been asked to stop after its current step."""
        return bool(self._line[_STOP])

    def ask_to_stop(self) -> None:
        """Set `asked_to_stop`."""
        self._line[_STOP] = 1

    def note_kept_weights(self) -> None:
        """Record that this rank can take part in another attempt with the weights that it has loaded."""
        self._line[_KEEPS] = 1

    def note_rejoining(self) -> None:
        """Record that this rank has lost a peer and waits for another attempt."""
        self._line[_REJOINS] = 1

    @property
    def admitted_attempt(self) -> int:
        """The last attempt that a rejoining rank was let into."""
        return self._line[_ATTEMPT]
