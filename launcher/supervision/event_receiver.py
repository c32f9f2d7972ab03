"""Receives rank 0's events in the parent, passes them to the observer, and sends rank 0 the observer's commands."""

import threading
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Client, Connection, Listener
from queue import SimpleQueue

from launcher.job.codec import read_event, write
from launcher.job.messages import Command, Stopped
from launcher.job.observer import RunObserver


class EventReceiver(threading.Thread):
    """Thread that serves one connection after the other: rank 0 of each attempt makes a new one."""

    def __init__(self, listener: Listener, observer: RunObserver, on_stopped: Callable[[], None]) -> None:
        """`on_stopped` is called when rank 0 has stopped as it was asked to."""
        super().__init__(daemon=True, name="events")
        self._listener, self._observer, self._on_stopped = listener, observer, on_stopped
        self.error: Exception | None = None
        """What the observer raised; later events are dropped."""
        self._finished = threading.Event()

    def run(self) -> None:
        """Run until `finish`, or until the parent closes the listener."""
        while not self._finished.is_set():
            try:
                connection = self._listener.accept()
            except OSError:
                return
            with connection:
                self._receive(connection)

    def finish(self) -> None:
        """Wait until all events have been handled. The ranks have exited, so their connection is closed."""
        if self._finished.is_set():
            return
        self._finished.set()
        with suppress(OSError):
            Client(self._listener.address).close()  # wakes `accept`
        self.join()

    def _receive(self, connection: Connection) -> None:
        # A rank in a long step does not read its socket; senders must not block on it.
        outbox: SimpleQueue[Command | None] = SimpleQueue()
        sender = threading.Thread(target=_send_all, args=(connection, outbox), daemon=True, name="to rank 0")
        sender.start()
        if not self._finished.is_set():
            self._observer.connect(outbox.put)
        try:
            self._hear(connection)
        finally:
            outbox.put(None)

    def _hear(self, connection: Connection) -> None:
        while True:
            try:
                event = read_event(connection.recv_bytes())
            except (EOFError, OSError):
                return
            if isinstance(event, Stopped):
                self._on_stopped()
            elif self.error is None:
                try:
                    self._observer.on_event(event)
                except Exception as error:  # the supervisor ends the run with it
                    self.error = error


def _send_all(connection: Connection, outbox: "SimpleQueue[Command | None]") -> None:
    with suppress(OSError):  # a rank that has died does not listen; the watch knows
        while (command := outbox.get()) is not None:
            connection.send_bytes(write(command).encode())
