"""What a rank that fails leaves behind for whoever watches it: exception, the end of its traceback, whether it is only an echo.

Knows exceptions and a file; not what is made of it.
"""

import json
import traceback
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from launcher.host.atomic_write import write_whole
from parallel.errors import PeerError, TandemError

_TAIL_LINES = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class RankFailure:
    """One rank's own account of its end."""

    exception: str
    """Type and message."""
    traceback_tail: str
    """The last lines of its traceback."""
    is_echo: bool
    """Whether it ended only since another rank had."""
    peer: int | None
    """The rank that it waited for, where it knows."""

    @classmethod
    def of(cls, error: BaseException) -> "RankFailure":
        """The account of an exception that is being handled."""
        lines = "".join(traceback.format_exception(error)).rstrip().splitlines()
        # What tandem says to users is a sentence already; of others the type is half of the message.
        words = str(error) if isinstance(error, TandemError) else f"{type(error).__name__}: {error}"
        is_echo = isinstance(error, PeerError)
        return cls(
            exception=words,
            traceback_tail="\n".join(lines[-_TAIL_LINES:]),
            is_echo=is_echo,
            peer=error.peer if isinstance(error, PeerError) else None,
        )

    def write(self, path: Path) -> None:
        """Leave it in a file."""
        write_whole(path, json.dumps(asdict(self)))


def read_failure(path: Path) -> RankFailure | None:
    """What a rank left there; None when it could not."""
    with suppress(OSError, ValueError, TypeError):
        return RankFailure(**json.loads(path.read_text(encoding="utf-8")))
    return None
