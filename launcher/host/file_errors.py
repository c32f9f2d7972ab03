"""OSErrors on user paths as one sentence, and the command's phase, which determines the exit code.

Before anything has started an OSError is an input error (exit code 2), afterwards a failed run (exit code 1).
"""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from model.spec.quoting import quote_name
from parallel.errors import RunError

_ADVICE = {
    errno.ENOSPC: "free some space, or choose another place",
    errno.EDQUOT: "free some space, or choose another place",
    errno.EROFS: "choose another place",
    errno.EMFILE: "raise the limit with ulimit -n",
    errno.ENFILE: "close other programs, or raise fs.file-max",
    errno.ENAMETOOLONG: "choose a shorter one",
    errno.ELOOP: "one of its links leads back to itself",
}


class OutputError(OSError):
    """Standard output cannot be written."""


class ReaderGoneError(OutputError):
    """The reader of standard output has exited. Has no errno, since click handles EPIPE itself, with exit code 1."""


def describe_os_error(error: OSError, path: Path | None = None) -> str:
    """Return a sentence with path, reason and, if available, advice. `path` is used if the error has no file name."""
    reason = error.strerror or str(error) or type(error).__name__
    found = error.filename if isinstance(error.filename, (str, bytes)) else path
    name = found.decode(errors="backslashreplace") if isinstance(found, bytes) else None if found is None else str(found)
    advice = _ADVICE.get(error.errno or 0)
    return f"{f'{quote_name(name)}: ' if name else ''}{reason}{f'; {advice}' if advice else ''}"


@contextmanager
def as_run_failure(path: Path | None = None) -> Iterator[None]:
    """Treat OSErrors in the block as failures of the run by raising RunError. ReaderGoneError passes through.

    `path` is used if the error has no file name.
    """
    try:
        yield
    except ReaderGoneError:
        raise
    except OSError as error:
        raise RunError(describe_os_error(error, path)) from error
