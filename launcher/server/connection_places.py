"""Connection limits derived from the open-file limit, and eviction of idle connections when the limit is reached.

An idle connection costs its client nothing, so it never keeps another client out. Does not depend on HTTP.
"""

import os
import resource
from collections import Counter
from typing import Protocol

from parallel.errors import ConfigError

DEFAULT_MAX_CONNECTIONS = 1024
ACCEPTED_AT_ONCE = 4
"""Connections accepted by the event loop per iteration."""
OVERFLOW_PLACES = 8
"""Connections beyond the limit that are still read, so that their requests receive a 503."""
_PASSES_UNTIL_CLOSED = 5
"""Event-loop iterations between accepting a connection and closing it after rejection; further connections are accepted meanwhile."""
_MAX_DESCRIPTORS = 65_536
_DESCRIPTORS_OF_PARENT = 20
_DESCRIPTORS_PER_RANK = 8
"""File descriptors the parent holds per rank (pipes, log file, store and event connections), including during a restart."""
_LEAST_CONNECTIONS = 16


def plan_connections(requested: int | None, num_local_ranks: int) -> int:
    """Return the maximum number of connections: `requested`, or what the open-file limit allows, up to DEFAULT_MAX_CONNECTIONS.

    Raises the soft open-file limit to the hard limit first. Raises ConfigError if the limit is too low.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MAX_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _MAX_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    limit = _MAX_DESCRIPTORS if soft == resource.RLIM_INFINITY else soft
    num_open = len(os.listdir("/proc/self/fd"))
    reserved = _DESCRIPTORS_OF_PARENT + _DESCRIPTORS_PER_RANK * num_local_ranks + _PASSES_UNTIL_CLOSED * ACCEPTED_AT_ONCE + OVERFLOW_PLACES
    allowed = limit - num_open - reserved
    needed = _LEAST_CONNECTIONS if requested is None else requested
    if allowed < needed:
        words = f"--max-connections {requested}" if requested is not None else f"a server of {num_local_ranks} ranks"
        raise ConfigError(f"the limit of open files is {limit}, but {words} needs {limit - allowed + needed}: raise it with ulimit -n")
    return min(DEFAULT_MAX_CONNECTIONS, allowed) if requested is None else requested


class Connection(Protocol):
    """Interface that ConnectionPlaces requires of a connection."""

    @property
    def is_idle(self) -> bool:
        """Whether no request is in progress."""
        ...

    def give_way(self) -> None:
        """Close the connection; it calls `leave` soon after."""
        ...


class ConnectionPlaces:
    """The open connections of one server."""

    def __init__(self, most: int, most_of_client: int) -> None:
        """`most` limits the total number of connections, `most_of_client` those per address."""
        self.most, self.most_of_client = most, most_of_client
        self._clients: dict[Connection, str] = {}
        """Address of each connection, the longest idle first."""
        self._counts: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._clients)

    def count(self, client: str) -> int:
        """Return the number of connections from one address."""
        return self._counts[client]

    def enter(self, connection: Connection, client: str) -> bool:
        """Register a connection. Returns False if it must be rejected because none is idle."""
        fits = True
        if self._counts[client] >= self.most_of_client:
            fits = self._evict([one for one, address in self._clients.items() if address == client and one.is_idle])
        elif len(self._clients) >= self.most:
            fits = self._evict([one for one in self._clients if one.is_idle])
        self._clients[connection] = client
        self._counts[client] += 1
        return fits

    def note_idle(self, connection: Connection) -> None:
        """Record that the connection's request has been answered."""
        if connection in self._clients:
            self._clients[connection] = self._clients.pop(connection)

    def leave(self, connection: Connection) -> None:
        """Unregister a closed connection; no effect if it was evicted before."""
        client = self._clients.pop(connection, None)
        if client is not None:
            self._counts[client] -= 1
            if not self._counts[client]:
                del self._counts[client]

    def _evict(self, idle: list[Connection]) -> bool:
        """Evict the longest-idle connection of the client with the most connections. Returns False if none is idle."""
        if not idle:
            return False
        found = max(idle, key=lambda one: self._counts[self._clients[one]])  # the first of equals
        self.leave(found)
        found.give_way()
        return True
