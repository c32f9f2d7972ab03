"""Memory of this process: return of freed memory to the system, current and peak size. Depends on glibc and /proc."""

import ctypes
import os
from contextlib import suppress
from pathlib import Path

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_M_MMAP_THRESHOLD, _M_ARENA_MAX = -3, -8  # malloc.h


def give_back_memory() -> None:
    """Configure glibc to return freed blocks of a megabyte or more to the system, and to use a single heap for all threads.

    By default it would retain up to 32 MB each for reuse, and a heap per thread.
    """
    with suppress(AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 20)
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)


def read_rss_bytes() -> int:
    """Return the current resident set size."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE_BYTES


def read_peak_rss_bytes() -> int:
    """Return the peak resident set size of this program."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0
