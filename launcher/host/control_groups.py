"""The control group's memory limit and number of OOM kills.

Reads /sys/fs/cgroup, versions 1 and 2. Without a memory group, as in the root group of version 2, uses the machine's counter.
"""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class MemoryGroup:
    """State of one memory control group."""

    limit_bytes: int | None
    """None means no limit."""
    num_kills: int
    """Number of processes killed in it by the OOM killer."""


def read_memory_group(root: Path = _ROOT, own: Path = Path("/proc/self/cgroup"), machine: Path = Path("/proc/vmstat")) -> MemoryGroup:
    """Read the memory control group of this process and its children; without one, no limit and the machine's kills."""
    with suppress(OSError):
        for line in own.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "memory":
                for folder in (root / "memory" / path.lstrip("/"), root / "memory"):
                    if folder.exists():
                        return MemoryGroup(_read_limit(folder / "memory.limit_in_bytes"), _read_kills(folder / "memory.oom_control"))
            if controllers == "":
                for folder in (root / path.lstrip("/"), root):
                    if (folder / "memory.events").exists():
                        return MemoryGroup(_read_limit(folder / "memory.max"), _read_kills(folder / "memory.events"))
    return MemoryGroup(None, _read_kills(machine))


def _read_limit(path: Path) -> int | None:
    with suppress(OSError, ValueError):
        limit = int(path.read_text())
        return limit if limit < 1 << 60 else None  # version 1 reports "no limit" as a number near 2^63
    return None


def _read_kills(path: Path) -> int:
    with suppress(OSError, ValueError):
        for line in path.read_text().splitlines():
            name, _, count = line.partition(" ")
            if name == "oom_kill":
                return int(count)
    return 0
