"""Whether the ranks of this host can gather through shared memory."""

import os
import platform

from model.kernels.library import find_kernels
from parallel.shared_words import WordAccess

_ORDERED = platform.machine() in ("x86_64", "AMD64")
"""Whether this processor keeps the order of plain stores."""


def shared_memory_works() -> bool:
    """Whether loads and stores of shared memory can be ordered, and the system supports the shared-memory backend."""
    ordered = _ORDERED or find_word_access() is not None
    return ordered and hasattr(os, "memfd_create") and hasattr(os, "pidfd_open")


def find_word_access() -> WordAccess | None:
    """Return ordered access to words of shared memory; None on x86-64, where plain access is ordered, and without native kernels."""
    kernels = None if _ORDERED else find_kernels()
    return None if kernels is None else kernels.word_access
