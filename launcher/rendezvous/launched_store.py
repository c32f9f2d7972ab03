"""The key-value store of ranks that a launcher started: which process serves it, heartbeats, and how long its host must stay."""

import threading
import time
from collections.abc import Callable
from contextlib import suppress

from launcher.environment.detection import LaunchEnvironment
from launcher.rendezvous.key_value_store import connect_store, open_store
from launcher.rendezvous.msrun_scheduler import BEAT_SECONDS, alive_key, bye_key
from parallel.errors import RunError
from parallel.torch_internals import PrefixStore, Store

_FAREWELL_SECONDS = 10.0
_FAILED_FAREWELL_SECONDS = 1.0
"""How long the store's host waits for other ranks to finish using the store."""


class LaunchedStore:
    """One rank's connection to the store of its launch, from joining to exit."""

    def __init__(self, environment: LaunchEnvironment, timeout_seconds: float) -> None:
        """Connect, or listen if this rank hosts the store. Raises StoreError."""
        address, port = environment.master_addr, environment.master_port
        assert environment.rank is not None and address is not None and port is not None
        self._environment, self._rank, self._timeout_seconds = environment, environment.rank, timeout_seconds
        self._is_host = self._rank == 0 and environment.store_host == "rank 0"
        self._raw: Store = open_store(address, port)[0] if self._is_host else connect_store(address, port, timeout_seconds)
        # The agent's store survives a restart; a prefix hides the keys of earlier attempts.
        self._prefix = f"tandem/attempt_{environment.restart_count}"
        self.store = PrefixStore(self._prefix, self._raw)
        self._ended = threading.Event()
        self._heartbeats: threading.Thread | None = None
        if environment.store_host == "scheduler":
            self._heartbeats = threading.Thread(target=self._show_life, args=(address, port), daemon=True, name="heartbeats")
            self._heartbeats.start()

    def announce_exit(self, code: int, *, waits: bool, is_over: Callable[[int], bool] = lambda rank: False) -> None:
        """Tell the store's host that this rank no longer needs the store.

        The host itself then waits for the other ranks if `waits`, except those for which `is_over` returns True.
        """
        self._ended.set()
        if self._heartbeats is not None:  # the interpreter's exit would abort a thread inside of a call
            self._heartbeats.join(_FAILED_FAREWELL_SECONDS)
        store, count = self.store, self._environment.world_size or 0
        with suppress(RuntimeError):
            store.set(bye_key(self._rank), str(code))
            if not self._is_host or not waits:
                return
            deadline = time.monotonic() + (_FAREWELL_SECONDS if code in (0, 2) else _FAILED_FAREWELL_SECONDS)
            while time.monotonic() < deadline and not all(store.check([bye_key(rank)]) or is_over(rank) for rank in range(count)):
                time.sleep(0.02)

    def _show_life(self, address: str, port: int) -> None:
        beats = 0
        with suppress(RuntimeError, RunError):
            store = PrefixStore(self._prefix, connect_store(address, port, self._timeout_seconds))
            while not self._ended.wait(BEAT_SECONDS if beats else 0):
                beats += 1
                store.set(alive_key(self._rank), str(beats))
