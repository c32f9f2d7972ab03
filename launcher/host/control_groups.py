"""The control group's limit of memory, and how often the kernel has ended a process for it. Knows /sys/fs/cgroup, versions 1 and 2."""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class MemoryGroup:
    """One control group as it was read."""

    limit_bytes: int | None
    """None: no limit."""
    num_kills: int
    """Processes that the kernel ended in it for want of memory."""


def read_memory_group(root: Path = _ROOT, own: Path = Path("/proc/self/cgroup")) -> MemoryGroup:
    """The memory control group of this process and of those that it starts; without one, no limit and no kills."""
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
    return MemoryGroup(None, 0)


def _read_limit(path: Path) -> int | None:
    with suppress(OSError, ValueError):
        limit = int(path.read_text())
        return limit if limit < 1 << 60 else None  # version 1 says "no limit" with a number near 2^63
    return None


def _read_kills(path: Path) -> int:
    with suppress(OSError, ValueError):
        for line in path.read_text().splitlines():
            name, _, count = line.partition(" ")
            if name == "oom_kill":
                return int(count)
    return 0
