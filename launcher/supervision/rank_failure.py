"""The failure record that a rank leaves for its watcher: exception, tail of the traceback, and whether it only echoes another failure."""

import json
import traceback
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from launcher.host.atomic_write import atomic_write
from parallel.errors import CheckpointError, ConfigError, PeerError, TandemError

_TAIL_LINES = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class RankFailure:
    """One rank's own record of its failure."""

    exception: str
    """Type and message."""
    traceback_tail: str
    """The last lines of the traceback."""
    is_echo: bool
    """Whether the rank failed only because another one had."""
    peer: int | None
    """The rank it was waiting for, if known."""
    is_input: bool = False
    """Whether the checkpoint or a setting is unusable, so that another attempt would fail the same way."""

    @classmethod
    def of(cls, error: BaseException) -> "RankFailure":
        """Create a record of the exception being handled."""
        lines = "".join(traceback.format_exception(error)).rstrip().splitlines()
        # tandem's own errors are complete sentences; for others the type is an essential part of the message.
        words = str(error) if isinstance(error, TandemError) else f"{type(error).__name__}: {error}"
        is_echo = isinstance(error, PeerError)
        return cls(
            exception=words,
            traceback_tail="\n".join(lines[-_TAIL_LINES:]),
            is_echo=is_echo,
            peer=error.peer if isinstance(error, PeerError) else None,
            is_input=isinstance(error, CheckpointError | ConfigError),
        )

    def write(self, path: Path) -> None:
        """Write the record to a file."""
        atomic_write(path, json.dumps(asdict(self)))


def read_failure(path: Path) -> RankFailure | None:
    """Read a rank's failure record; None if there is none."""
    with suppress(OSError, ValueError, TypeError):
        return RankFailure(**json.loads(path.read_text(encoding="utf-8")))
    return None
