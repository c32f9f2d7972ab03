"""Cores that a run of tandem has claimed, so that no other run on this host is bound to them.

A claim is a Unix socket whose abstract name lists the cores: every process sees it in /proc/net/unix, and the kernel removes it with its
process.
"""

import os
import secrets
import socket
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from launcher.host.cores import count_cores
from launcher.host.numa import format_cores, parse_cores, place_ranks, read_nodes

_CLAIMS = Path("/proc/net/unix")
_ONLINE = Path("/sys/devices/system/cpu/online")
_NAME = "tandem-cores"
_MAX_NAME_BYTES = 100
"""The kernel takes up to 107."""

Cores = tuple[int, ...]


@contextmanager
def claim_cores(num_ranks: int, threads: int, *, may_bind: bool = True) -> Iterator[tuple[Cores, ...] | None]:
    """Claim cores for the ranks of this host until the end of the block, and yield those of each rank.

    Yields None, and claims every core that this process may use, if not `may_bind`, if not all threads of all ranks get a core of their
    own, or if something else has chosen the cores of this process: an affinity, or a control group.
    """
    usable = os.sched_getaffinity(0)
    with ExitStack() as claims:
        placed = None
        try:
            if may_bind and not _is_restricted(usable):
                placed = place_ranks(num_ranks, threads, usable - _read_claims(), read_nodes())
            mine = usable if placed is None else {core for cores in placed for core in cores}
            own = _claim(mine, claims)
            # Claimed first and looked at afterwards: of two runs that start together, none is bound to a core of the other.
            if placed is not None and mine & _read_claims(own):
                claims.close()
                placed = None
                _claim(usable, claims)
        except OSError:  # no such sockets here
            placed = None
        yield placed


def _is_restricted(usable: Collection[int]) -> bool:
    """Return whether this process may not use every core of the host to the full."""
    try:
        online = parse_cores(_ONLINE.read_text())
    except (OSError, ValueError):
        return True
    return set(usable) != set(online) or count_cores() < len(online)


def _claim(cores: Collection[int], claims: ExitStack) -> str:
    """Claim cores until `claims` is closed; returns the name of the claim."""
    name = f"{_NAME}/{secrets.token_hex(4)}/{format_cores(cores)}"
    if len(name) > _MAX_NAME_BYTES:  # scattered over a large host: the range that holds them
        name = f"{_NAME}/{secrets.token_hex(4)}/{min(cores)}-{max(cores)}"
    claim = claims.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
    claim.bind(f"\0{name}")
    return name


def _read_claims(but: str = "") -> set[int]:
    """Return the cores that runs have claimed, except by the claim named `but`."""
    claimed: set[int] = set()
    for line in _CLAIMS.read_text(errors="replace").splitlines():
        name = line.rpartition(" @")[2]
        if name.startswith(f"{_NAME}/") and name != but:
            try:
                claimed.update(parse_cores(name.rpartition("/")[2]))
            except ValueError:
                continue  # of another program
    return claimed
