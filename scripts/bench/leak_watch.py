"""Memory and descriptors of a server's processes, as Linux tells them, and what its /status says: whether anything leaks."""

import asyncio
import statistics
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from http_client import Address, fetch_json

LEAK_BYTES = 32 << 20
"""Growth below this is no leak: allocators keep what they had at a peak."""
LEAK_SHARE = 0.1
"""Nor is growth below this share of what was there at first."""


@dataclass(frozen=True, slots=True)
class Sample:
    """Resident bytes at one moment, by process: `server`, `rank 0`, …; ranks that were not at work are left out."""

    rss_bytes: dict[str, int]


@dataclass(frozen=True, slots=True)
class Growth:
    """Medians of the first and the last tenth of the samples of a process."""

    first_bytes: float
    last_bytes: float

    def is_leak(self) -> bool:
        """Whether it is more than allocators explain."""
        return self.last_bytes - self.first_bytes > max(LEAK_BYTES, LEAK_SHARE * self.first_bytes)


def read_rss_bytes(pid: int) -> int | None:
    """Resident memory of a process; None when it is gone."""
    for line in _read(pid, "status").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    return None


def count_descriptors(pid: int) -> int | None:
    """Open files and connections of a process; None when it is gone, or somebody else's."""
    try:
        return sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())
    except OSError:
        return None


def is_descendant(pid: int, ancestor: int) -> bool:
    """Whether a living process was started by `ancestor`, or by one that was."""
    while pid > 1:
        # Behind the name, which may have blanks and brackets: state, then the parent.
        fields = _read(pid, "stat").rpartition(")")[2].split()
        if len(fields) < 2 or fields[0] == "Z":
            return False
        pid = int(fields[1])
        if pid == ancestor:
            return True
    return False


def read_sample(server_pid: int | None, status: dict[str, Any] | None) -> Sample:
    """Of the server and, when GET /status says that it is ready, of its ranks on this machine."""
    pids = {"server": server_pid}
    if status and server_pid and status.get("state") == "ready":
        pids |= {f"rank {one['rank']}": one["pid"] for one in status["ranks"] if one["pid"] and is_descendant(one["pid"], server_pid)}
    found = {name: read_rss_bytes(pid) for name, pid in pids.items() if pid}
    return Sample({name: rss_bytes for name, rss_bytes in found.items() if rss_bytes is not None})


def compare_tenths(samples: Sequence[Sample]) -> dict[str, Growth]:
    """Of every process that was seen twice or more."""
    by_name: dict[str, list[int]] = {}
    for sample in samples:
        for name, rss_bytes in sample.rss_bytes.items():
            by_name.setdefault(name, []).append(rss_bytes)
    tenths = {name: (values, max(1, len(values) // 10)) for name, values in sorted(by_name.items()) if len(values) > 1}
    return {name: Growth(statistics.median(values[:count]), statistics.median(values[-count:])) for name, (values, count) in tenths.items()}


def judge_growth(growth: Mapping[str, Growth]) -> list[str]:
    """Faults in it."""
    return [
        f"memory of {name} grew from {one.first_bytes / 1e6:.0f} to {one.last_bytes / 1e6:.0f} MB"
        for name, one in growth.items()
        if one.is_leak()
    ]


async def read_status(address: Address) -> dict[str, Any] | None:
    """GET /status; None when there is no answer that says something."""
    with suppress(OSError, EOFError, ValueError, asyncio.TimeoutError):
        status, answer = await asyncio.wait_for(fetch_json(address, "GET", "/status"), 10)
        return dict(answer) if status == 200 else None
    return None


def judge_idle(before: dict[str, Any] | None, after: dict[str, Any] | None, kills: int) -> list[str]:
    """Faults in what /status says behind all requests."""
    if not after:
        return ["no answer from /status when all requests were done"]
    faults = [] if after["state"] == "ready" else [f"the server is {after['state']} when all requests are done"]
    faults += [f"{after[name]} requests are still {name}" for name in ("running", "waiting") if after[name]]
    if after["blocks_used"]:
        faults.append(f"{after['blocks_used']} blocks leaked: they are in use while nothing runs")
    if kills and before and not (after["restarts"] or 0) > (before["restarts"] or 0):
        faults.append(f"{kills} kills, but no restart is reported")
    return faults


def _read(pid: int, name: str) -> str:
    try:
        return Path(f"/proc/{pid}/{name}").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
