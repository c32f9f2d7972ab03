"""The errors that users meet. Every message is one or two sentences: both numbers, then what to do next.

TandemError
├── InputError       the user's input cannot be used; found before any process starts (exit code 2)
│   ├── LayoutError      more ranks than units
│   ├── ConfigError      config.json, YAML or options
│   ├── CheckpointError  files: missing, short, unexpected, of the wrong type
│   └── RequestError     prompts and sampling options
└── RunError         a run that had started went wrong (exit code 1)
    ├── NonFiniteError   logits are NaN or infinite; every rank raises it in the same step
    └── PeerError        another rank died or stopped answering
"""

__all__ = [
    "CheckpointError",
    "ConfigError",
    "InputError",
    "LayoutError",
    "NonFiniteError",
    "PeerError",
    "RequestError",
    "RunError",
    "TandemError",
]


class TandemError(Exception):
    """Base of all errors that tandem raises for its users."""


class InputError(TandemError, ValueError):
    """The input cannot be used; nothing has started."""


class LayoutError(InputError):
    """This number of ranks does not fit this model."""


class ConfigError(InputError):
    """A setting, a config.json or a YAML key is wrong."""


class CheckpointError(InputError):
    """A checkpoint cannot be read as it stands."""


class RequestError(InputError):
    """A prompt or a sampling option cannot be used."""


class RunError(TandemError, RuntimeError):
    """A run that had started failed."""


class NonFiniteError(RunError):
    """Logits are NaN or infinite. Every rank sees the same logits, so all raise it in the same step, and a restart would not help."""


class PeerError(RunError):
    """Another rank died or stopped answering while this one waited for it."""

    def __init__(self, message: str, operation: str, *, peer: int | None = None, died: bool = False) -> None:
        super().__init__(message)
        self.operation = operation
        """What this rank waited in."""
        self.peer = peer
        """The rank that died or did not come; None when it is not known."""
        self.died = died
        """Whether its process has ended."""
