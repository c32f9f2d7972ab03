"""Atomic writes of text files: a temporary file, fsync, rename. Devices, pipes and streams are written directly.

Symbolic links are followed and kept; a file keeps its mode and owner.
"""

import errno
import os
import re
import secrets
import stat
import sys
from contextlib import suppress
from pathlib import Path

from parallel.regular_file import describe_kind

_OWN_STREAM = re.compile(r"/dev/(?:fd/(\d+)|(stdout)|(stderr))|/proc/(?:self|thread-self)/fd/(\d+)")
"""Paths that name an open descriptor of this process; if it is a file, another program may be writing it, too."""


def atomic_write(path: Path, text: str) -> None:
    """Write `text` to `path`, creating its folder if missing.

    Raises OSError naming `path` if the file cannot be written or is a folder, socket or block device; leaves no partial file behind.
    """
    try:
        if needs_direct_writing(path):
            _write_all(open_direct(path), text.encode())
        else:
            _replace(Path(os.path.realpath(path)), text.encode())
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def needs_direct_writing(path: Path) -> bool:
    """Return whether `path` must not be replaced by a rename: a device, a FIFO, or a stream such as /dev/stdout.

    Raises OSError if the path cannot be written at all.
    """
    if _OWN_STREAM.fullmatch(str(path)):
        return True
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return False
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "it is a folder, but a file is needed", str(path))
    if stat.S_ISSOCK(mode) or stat.S_ISBLK(mode):
        raise OSError(errno.EINVAL, f"it is {describe_kind(mode)}, but a file is needed", str(path))
    return not stat.S_ISREG(mode)


def open_direct(path: Path) -> int:
    """Open a device, a FIFO or a stream for writing and return the descriptor. Raises OSError for a FIFO without a reader."""
    if (match := _OWN_STREAM.fullmatch(str(path))) is None:
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        except OSError as error:
            reason = "it has no reader" if error.errno == errno.ENXIO else error.strerror
            raise OSError(error.errno, reason, str(path)) from None
        os.set_blocking(descriptor, True)
        return descriptor
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    return os.dup(1 if match[2] else 2 if match[3] else int(match[1] or match[4]))


def _write_all(descriptor: int, data: bytes) -> None:
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(descriptor, view) :]
    finally:
        os.close(descriptor)


def _replace(target: Path, data: bytes) -> None:
    before = os.stat(target) if target.exists() else None
    if before is not None and not os.access(target, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(target))
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f".partial-{secrets.token_hex(8)}"
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        with open(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            if before is not None:
                with suppress(PermissionError):
                    os.fchown(file.fileno(), before.st_uid, before.st_gid)
                os.fchmod(file.fileno(), stat.S_IMODE(before.st_mode))
            os.fsync(file.fileno())
        temporary.rename(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
