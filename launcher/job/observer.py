"""Interface for following a run from the parent: receives rank 0's events, supplies the remaining work after a failure, may send messages.

Each command has its own observer.
"""

from collections.abc import Callable
from pathlib import Path

from launcher.job.messages import Command, Event
from launcher.job.tasks import Task

Send = Callable[[Command], None]
"""Sends a command to rank 0; does not wait for it."""


class RunObserver:
    """Base observer that does nothing. Methods are called from several threads, but each one from only one thread at a time."""

    redone = "start over"
    """What happens after a restart, as part of a message."""

    def use_log_folder(self, folder: Path) -> None:
        """Take the folder of the logs of ranks that this process starts; called before they start."""

    def on_event(self, event: Event) -> None:
        """Take one event of rank 0."""

    def connect(self, send: Send) -> None:
        """Attach to rank 0 of a new attempt; messages passed to `send` reach it unless it has died."""

    def continue_task(self, task: Task) -> Task:
        """Return what the next attempt has to do, given the run's original `task`."""
        return task

    def note_failure(self, cause: str, at_seconds: float) -> None:
        """Handle a rank failure at this time.time(); all ranks restart."""

    def may_restart(self) -> bool:
        """Return whether another attempt makes sense after a failure."""
        return True

    def takes_signal(self, number: int) -> bool:
        """Return True to consume a signal, so that the run continues. Called in the signal handler."""
        return False

    def ask_to_stop(self, number: int) -> float | None:
        """Handle a shutdown request; called in the signal handler. Returns the seconds that the observer's own shutdown may take, or
        None to stop rank 0 after its current token."""
        return None
