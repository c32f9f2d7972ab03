"""The key-value stores for the rendezvous: PyTorch's TCPStore, bound to a single address, and its FileStore inside a host."""

import socket
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

from launcher.host.loopback import is_loopback
from launcher.rendezvous.errors import StoreError
from parallel.observed_time import ObservedTime
from parallel.torch_internals import FileStore, Store, TCPStore

_CALL_SECONDS = 30.0
"""Time limit of one request to a reachable store."""
_RETRY_SECONDS = 0.1
_NAME_SECONDS = 20.0


def open_store(address: str, port: int) -> tuple[TCPStore, int]:
    """Open a store that listens on this address only, and return it with its port (any free one for 0). Raises StoreError."""
    listener = None
    try:
        family, kind, protocol, _, where = _resolve(address, port)
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(where)
        listener.listen(1024)
    except OSError as error:
        if listener is not None:
            listener.close()
        cause = error.strerror or str(error)
        raise StoreError(f"cannot listen on {address}, port {port}: {cause}; choose another --master-port or --master-addr") from None
    bound_port: int = listener.getsockname()[1]
    store = TCPStore(
        address,
        bound_port,
        is_master=True,
        wait_for_workers=False,
        timeout=timedelta(seconds=_CALL_SECONDS),
        master_listen_fd=listener.detach(),
    )
    return store, bound_port


def open_file_store(path: Path, num_users: int) -> Store:
    """Open the store of the ranks of one host, a file that the first of its `num_users` creates. It needs no host of its own."""
    return FileStore(str(path), num_users)


def _resolve(address: str, port: int) -> tuple[Any, ...]:
    """Resolve a name to its first address, retrying: names of newly created pods or hosts take seconds to resolve."""
    deadline = time.monotonic() + _NAME_SECONDS
    while True:
        try:
            return socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
        except socket.gaierror:
            if time.monotonic() > deadline:
                raise
            time.sleep(1)


def _nothing() -> None:
    """Default: no additional check."""


def connect_store(
    address: str, port: int, timeout_seconds: float, *, call_seconds: float = _CALL_SECONDS, check: Callable[[], None] = _nothing
) -> TCPStore:
    """Connect to the store that another process opens within the timeout; `call_seconds` limits each request to it.

    `check` is called while waiting and may raise. Raises StoreError.
    """
    clock, cause = ObservedTime(), "no answer"
    while clock.read() < timeout_seconds:
        check()
        try:
            # Probe in Python first, where signals can interrupt; the store's own attempts cannot be interrupted.
            socket.create_connection((address, port), timeout=min(2.0, timeout_seconds)).close()
            return TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=call_seconds))
        except (OSError, RuntimeError) as error:
            cause = (getattr(error, "strerror", None) or str(error) or "no answer").splitlines()[0]
        time.sleep(_RETRY_SECONDS)
    raise StoreError(
        f"no answer from {address}, port {port} within {timeout_seconds:g} s ({cause}): is the first node or rank running, "
        "and is this its address?"
    )


def find_own_address(master_addr: str) -> str:
    """Return the address under which the master's host can reach this one: that of the outgoing interface."""
    if is_loopback(master_addr):
        return "127.0.0.1"
    with suppress(OSError):
        family, _, _, _, where = socket.getaddrinfo(master_addr, 1, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(where)  # sends no packets
            return str(probe.getsockname()[0])
    return "127.0.0.1"
