"""The memory of this process: how freed tensors go back to the system, what there is and the most that there was. Knows glibc and /proc."""

import ctypes
import os
from contextlib import suppress
from pathlib import Path

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_M_MMAP_THRESHOLD, _M_ARENA_MAX = -3, -8  # malloc.h


def give_back_memory() -> None:
    """Have glibc return freed tensors of a megabyte or more to the system, and smaller ones of all threads to one heap.

    It would keep up to 32 MB each for later, and a heap for each thread.
    """
    with suppress(AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 20)
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)


def read_rss_bytes() -> int:
    """The resident size of this process now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE_BYTES


def read_peak_rss_bytes() -> int:
    """The largest resident size of this process so far, its own program only."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0
