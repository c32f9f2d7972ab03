"""Places for `chaos_faults.py` in which a run is short of something: a small file system, a memory limit, a network that fails.

Each needs root and a part of the system that a container may lack; where that is so, MissingError says what.
"""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

GROUPS = Path("/sys/fs/cgroup")


class MissingError(Exception):
    """A fault that cannot be made on this machine."""


def _call(*words: str) -> None:
    try:
        subprocess.run(words, check=True, capture_output=True, text=True, timeout=20)
    except FileNotFoundError:
        raise MissingError(f"{words[0]} is not installed") from None
    except subprocess.CalledProcessError as error:
        raise MissingError(f"{' '.join(words[:3])}: {error.stderr.strip()}") from None


@contextmanager
def full_disk(folder: Path, free_bytes: int) -> Iterator[Path]:
    """A file system of its own in which so many bytes are free."""
    place = folder / "full"
    place.mkdir(exist_ok=True)
    _call("mount", "-t", "tmpfs", "-o", f"size={max(4096, free_bytes)}", "tmpfs", str(place))
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=False, timeout=20)
        place.rmdir()


@contextmanager
def memory_limit(limit_bytes: int) -> Iterator[Path]:
    """A control group; processes join by writing their ids into the file that is given."""
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    first = {controllers: path.lstrip("/") for _, controllers, path in (line.split(":", 2) for line in lines)}
    if "memory" in first:
        group, limit = GROUPS / "memory" / first["memory"] / f"chaos-{os.getpid()}", "memory.limit_in_bytes"
    else:
        group, limit = GROUPS / first.get("", "") / f"chaos-{os.getpid()}", "memory.max"
    try:
        group.mkdir()
    except OSError as error:
        raise MissingError(f"no control group can be made: {error}") from None
    try:
        try:
            (group / limit).write_text(str(limit_bytes))
        except OSError as error:
            raise MissingError(f"no control group's memory can be limited: {error}") from None
        yield group / "cgroup.procs"
    finally:
        group.rmdir()


@dataclass(frozen=True)
class Network:
    """Two network namespaces with a link."""

    prefixes: tuple[tuple[str, ...], tuple[str, ...]]
    """Words before a command that runs in each."""
    address: str
    """Of the first."""
    link: tuple[str, str]
    """Namespace and device of the second one's end."""

    def set_link(self, state: str) -> None:
        """Take the link up or down."""
        _call("ip", "-n", self.link[0], "link", "set", self.link[1], state)


@contextmanager
def network() -> Iterator[Network]:
    """Gone at the end of the block."""
    if shutil.which("ip") is None:
        raise MissingError("ip (package iproute2) is not installed")
    mark, subnet = os.getpid() % 100000, f"10.78.{os.getpid() % 250}"
    names, ends = (f"cha{mark}a", f"cha{mark}b"), (f"cha{mark}v", f"cha{mark}w")
    try:
        for name in names:
            _call("ip", "netns", "add", name)
            _call("ip", "-n", name, "link", "set", "lo", "up")
        _call("ip", "-n", names[0], "link", "add", ends[0], "type", "veth", "peer", "name", ends[1], "netns", names[1])
        for number, (name, end) in enumerate(zip(names, ends, strict=True), 1):
            _call("ip", "-n", name, "addr", "add", f"{subnet}.{number}/24", "dev", end)
            _call("ip", "-n", name, "link", "set", end, "up")
        first, second = (("ip", "netns", "exec", name) for name in names)
        yield Network((first, second), f"{subnet}.1", (names[1], ends[1]))
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True, timeout=20)
