"""Open regular files only, without blocking: FIFOs, devices, sockets and folders are refused, and text files above a size limit.

Every refusal is an OSError whose `strerror` gives the reason, so that it reads like one raised by the system.
"""

import errno
import io
import os
import stat
from pathlib import Path

MAX_KEY_BYTES = 1 << 20
"""Key files."""
MAX_YAML_BYTES = 1 << 20
"""YAML files: PyYAML takes up to about 20 seconds per MB."""
MAX_LIST_BYTES = 1 << 24
"""Checksum lists: over 100,000 files."""
MAX_INDEX_BYTES = 1 << 27
"""JSON files with an entry per tensor."""
MAX_VOCABULARY_BYTES = 1 << 28
"""Vocabularies."""
MAX_DATA_BYTES = 1 << 31
"""Prompts, and calibration and evaluation texts."""

_KINDS = (
    (stat.S_ISREG, "a file"),
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a character device"),
    (stat.S_ISBLK, "a block device"),
)


def describe_kind(mode: int) -> str:
    """Describe the file type of this `st_mode`."""
    return next((words for matches, words in _KINDS if matches(mode)), "a file of another kind")


def open_regular(path: Path) -> io.FileIO:
    """Open a regular file for unbuffered reading. Raises OSError for any other type of file; never blocks."""
    return io.FileIO(open_descriptor(path))


def open_descriptor(path: Path) -> int:
    """Open a regular file for reading and return its descriptor. Raises OSError for any other type of file; never blocks."""
    try:
        _require_regular(path, os.stat(path).st_mode)  # check before opening: opening some devices has side effects
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except ValueError:
        raise OSError(errno.EINVAL, "a path cannot hold a null byte", repr(str(path))) from None
    try:
        _require_regular(path, os.fstat(descriptor).st_mode)
        return descriptor
    except BaseException:
        os.close(descriptor)
        raise


def read_bytes(path: Path, max_bytes: int) -> bytes:
    """Read a regular file. Raises OSError for any other type of file and for a file larger than `max_bytes`."""
    with io.BufferedReader(open_regular(path)) as file:
        size = os.fstat(file.fileno()).st_size
        # Files in /proc report a size of 0, and others may grow.
        content = b"" if size > max_bytes else file.read(max_bytes + 1)
    if size > max_bytes or len(content) > max_bytes:
        raise OSError(errno.EFBIG, f"it has {max(size, len(content))} bytes, but at most {max_bytes} are read", str(path))
    return content


def read_text(path: Path, max_bytes: int, *, encoding: str = "utf-8", errors: str = "strict") -> str:
    """Read a regular file as text with newlines normalized to \n. Raises the errors of `read_bytes`, and UnicodeDecodeError."""
    return io.TextIOWrapper(io.BytesIO(read_bytes(path, max_bytes)), encoding=encoding, errors=errors).read()


def _require_regular(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        number = errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL
        raise OSError(number, f"it is {describe_kind(mode)}, but a regular file is needed", str(path))
