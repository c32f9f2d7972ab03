"""Errors of the rendezvous between nodes and ranks."""

from parallel.errors import InputError, RunError


class StoreError(RunError):
    """The rendezvous address is unreachable, or another process listens there."""


class NodesError(RunError):
    """A node did not join, or was lost."""

    def __init__(self, message: str, node: int) -> None:
        super().__init__(message)
        self.node = node
        """The node at fault."""


class RunOver(RunError):
    """Another node has ended the run with a verdict."""


class DifferentRunError(InputError):
    """Nodes or ranks were started for different runs."""
