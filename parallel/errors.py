"""User-facing errors. A message is one or two sentences: what is wrong (with both values), then what to do.

TandemError
├── InputError       the user's input cannot be used; found before any process starts (exit code 2)
│   ├── LayoutError      more ranks than units
│   ├── ConfigError      config.json, YAML or options
│   ├── CheckpointError  files: missing, truncated, unexpected, of the wrong dtype
│   └── RequestError     prompts and sampling options
└── RunError         a run failed after it had started (exit code 1)
    ├── NonFiniteError   logits are NaN or infinite; every rank raises it in the same step
    └── PeerError        another rank died or stopped responding
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
    """Base class of all user-facing errors."""


class InputError(TandemError, ValueError):
    """The input cannot be used; no process has been started."""


class LayoutError(InputError):
    """The model cannot be split over this number of ranks."""


class ConfigError(InputError):
    """An option, a config.json field or a YAML key is invalid."""


class CheckpointError(InputError):
    """A checkpoint cannot be read."""


class RequestError(InputError):
    """A prompt or a sampling option is invalid."""


class RunError(TandemError, RuntimeError):
    """A run failed after it had started."""


class NonFiniteError(RunError):
    """Logits are NaN or infinite. All ranks see the same logits and raise it in the same step; a restart would not help."""


class PeerError(RunError):
    """Another rank died or stopped responding while this one waited for it."""

    def __init__(self, message: str, operation: str, *, peer: int | None = None, died: bool = False) -> None:
        super().__init__(message)
        self.operation = operation
        """The operation in which this rank was waiting."""
        self.peer = peer
        """The rank that died or is late; None if unknown."""
        self.died = died
        """Whether its process has exited."""
