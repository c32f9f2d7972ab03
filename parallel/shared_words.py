"""Words of memory that processes share, where the processor does not keep the order of plain loads and stores."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class WordAccess:
    """Native access to 64-bit words of shared memory, ordered on every processor."""

    load: Callable[[int], int]
    """Return the word at an address; what its writer stored before it is visible afterwards."""
    store: Callable[[int, int], None]
    """Set the word at an address, after all earlier loads and stores."""


class AtomicWords:
    """The 64-bit words from an address on."""

    def __init__(self, address: int, access: WordAccess) -> None:
        self._address, self._access = address, access

    def __getitem__(self, index: int) -> int:
        return self._access.load(self._address + 8 * index)

    def __setitem__(self, index: int, value: int) -> None:
        self._access.store(self._address + 8 * index, value)
