"""An idle TCP connection between every two ranks, used to detect deaths: it closes when a rank's process exits.

gloo detects a death only through its own pending work, and a process group with pending work cannot be destroyed, so a rank that timed
out would never exit. A host that vanishes without closing its connections is detected by timeouts only.
"""

import socket
import struct
from collections.abc import Sequence

from parallel.errors import PeerError
from parallel.observed_time import ObservedTime
from parallel.store_waiting import store_errors, wait_for_ranks
from parallel.torch_internals import Store

_LOOK_SECONDS = 0.2
_RANK = struct.Struct("!q")


class PeerLines:
    """Connections from `rank` to the other `ranks`. Listens on `address`, only until all are connected."""

    def __init__(self, store: Store, rank: int, ranks: Sequence[int], address: str, timeout_seconds: float) -> None:
        self._lines: dict[int, socket.socket] = {}
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with socket.create_server((address, 0), family=family, backlog=len(ranks)) as listener:
            with store_errors("rendezvous"):
                store.set(f"line/{rank}", f"{listener.getsockname()[1]} {address}")
            wait_for_ranks(store, "line", ranks, timeout_seconds, "rendezvous")
            # Connections queue at the listener until accepted, so all ranks can connect before any of them accepts.
            for peer in (other for other in ranks if other < rank):
                self._lines[peer] = _call(store, rank, peer, timeout_seconds)
            self._answer(listener, [other for other in ranks if other > rank], timeout_seconds)
        for line in self._lines.values():
            line.setblocking(False)

    def find_gone(self) -> list[int]:
        """Return the peers whose processes have exited or have closed their connections."""
        return [peer for peer, line in self._lines.items() if _has_ended(line)]

    def close(self) -> None:
        """Close the connections."""
        for line in self._lines.values():
            line.close()
        self._lines = {}

    def _answer(self, listener: socket.socket, callers: Sequence[int], timeout_seconds: float) -> None:
        clock = ObservedTime()
        listener.settimeout(_LOOK_SECONDS)
        while missing := [peer for peer in callers if peer not in self._lines]:
            try:
                line, _ = listener.accept()
            except TimeoutError:
                if clock.read() < timeout_seconds:
                    continue
                raise PeerError(
                    f"rank {missing[0]} did not connect within {timeout_seconds:g} s, {len(callers) - len(missing)} of {len(callers)} "
                    "ranks did; a longer --timeout allows slower ranks",
                    "rendezvous",
                    peer=missing[0],
                ) from None
            line.settimeout(max(timeout_seconds - clock.read(), 0.001))
            try:
                (caller,) = _RANK.unpack(line.recv(_RANK.size, socket.MSG_WAITALL))
            except (OSError, struct.error):
                caller = -1
            if caller in missing:
                self._lines[caller] = line
            else:  # not a rank of this run
                line.close()


def _call(store: Store, rank: int, peer: int, timeout_seconds: float) -> socket.socket:
    with store_errors("rendezvous"):
        port, _, address = store.get(f"line/{peer}").decode().partition(" ")
    try:
        line = socket.create_connection((address, int(port)), timeout=timeout_seconds)
        line.sendall(_RANK.pack(rank))
    except TimeoutError:
        raise PeerError(
            f"rank {peer} at {address} did not answer rank {rank} within {timeout_seconds:g} s", "rendezvous", peer=peer
        ) from None
    except OSError as error:
        raise PeerError(f"rank {rank} cannot reach rank {peer} at {address}: {error}", "rendezvous", peer=peer) from error
    return line


def _has_ended(line: socket.socket) -> bool:
    try:
        return line.recv(1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True
