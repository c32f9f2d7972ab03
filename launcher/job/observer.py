"""Who follows a run from the parent's side: hears rank 0, says what is left to do after a failure, and may talk to rank 0.

Knows no command; each command has an observer of its own, with what it needs of this.
"""

from collections.abc import Callable

from launcher.job.messages import Command, Event
from launcher.job.tasks import Task

Send = Callable[[Command], None]
"""Sends a command to rank 0; does not wait for it."""


class RunObserver:
    """Nothing of it has to be answered. Calls come from several threads, each kind from one at a time."""

    redone = "begin anew"
    """In words, what happens again after a restart."""

    def on_event(self, event: Event) -> None:
        """Take one event of rank 0."""

    def connect(self, send: Send) -> None:
        """Rank 0 of a new attempt is there; what is given to `send` reaches it, unless it has died."""

    def continue_task(self, task: Task) -> Task:
        """What an attempt has to do, of the `task` that the run began with."""
        return task

    def note_failure(self, cause: str, at_seconds: float) -> None:
        """A rank failed at this time.time(), and all start again."""

    def may_restart(self) -> bool:
        """Whether another attempt makes sense now that one has failed."""
        return True

    def takes_signal(self, number: int) -> bool:
        """In the handler of a signal: whether it means something else than the end, so that the run continues."""
        return False

    def ask_to_stop(self, number: int) -> float | None:
        """A signal asks for the end; in its handler. How many seconds the end that the observer brings about may take; None: rank 0 is to
        stop after its current token."""
        return None
