"""Setup of the three standard streams: always open, able to encode any text, and with defined behavior on write errors.

- A closed stream is opened on /dev/null, so that no other file gets its descriptor.
- Characters that the encoding lacks are written as escapes.
- A full standard output ends the command with exit code 1. If its reader has exited (`| head -1`), the command exits quietly with 141,
  like tools killed by SIGPIPE. Messages that standard error cannot take are dropped: they must not end a run.
"""

import io
import os
import select
import sys
from collections.abc import Callable
from functools import wraps
from typing import Any, TextIO

from launcher.host.file_errors import OutputError, ReaderGoneError, describe_os_error
from parallel.errors import ConfigError

EXIT_BROKEN_PIPE = 141
"""128 + SIGPIPE, the exit status of other tools whose reader has exited."""
_closed: set[int] = set()
"""Streams that were closed at startup."""


class _Output(io.FileIO):
    """Standard output or standard error, unbuffered. Discards all output after its first error."""

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self._is_broken = False

    def write(self, data: Any, /) -> int:
        view = memoryview(data)
        if self._is_broken:
            return view.nbytes
        try:
            # None: non-blocking mode, set by another program that shares the terminal or pipe.
            while (count := super().write(view)) is None:
                select.select([], [self], [])
            return count
        except OSError as error:
            self._is_broken = True
            if self.fileno() == 2:
                return view.nbytes
            if isinstance(error, BrokenPipeError):
                raise ReaderGoneError from None
            raise OutputError(error.errno, error.strerror, "standard output") from None


def guard_streams(command: Callable[[], None]) -> Callable[[], None]:
    """Prepare the streams, run `command`, and flush; reports an OSError as one sentence with an exit code."""

    @wraps(command)
    def guarded() -> None:
        prepare_streams()
        try:
            try:
                command()
            finally:
                sys.stdout.flush()
        except ReaderGoneError:
            sys.exit(EXIT_BROKEN_PIPE)
        except OSError as error:
            print(f"tandem: {describe_os_error(error)}", file=sys.stderr)
            sys.exit(1 if isinstance(error, OutputError) else 2)

    return guarded


def prepare_streams() -> None:
    """Open closed streams on /dev/null and make open ones accept any text. Streams replaced by a test are kept."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            _closed.add(descriptor)
            # open() returns the lowest free descriptor, which is this one: those below are open.
            os.open(os.devnull, os.O_RDWR)
    if sys.stdin is None:
        sys.stdin = open(0, closefd=False)
    if sys.stdout is sys.__stdout__ or sys.stdout is None:
        sys.stdout = _wrap(1, sys.stdout)
    if sys.stderr is sys.__stderr__ or sys.stderr is None:
        sys.stderr = _wrap(2, sys.stderr)


def require_stdout(remedy: str) -> None:
    """Raise ConfigError if a command's only output is standard output and it is closed."""
    if 1 in _closed:
        raise ConfigError(f"standard output is closed, so the results would be lost: {remedy}")


def _wrap(descriptor: int, stream: TextIO | None) -> TextIO:
    encoding = stream.encoding if stream is not None else "utf-8"
    return io.TextIOWrapper(
        io.BufferedWriter(_Output(descriptor)),
        encoding=encoding,
        errors="backslashreplace",
        line_buffering=descriptor == 2 or os.isatty(descriptor),
    )
