"""Open regular files only, without blocking: a FIFO, device, socket or folder is refused, and a text file larger than its limit.

Every refusal is an OSError whose `strerror` is the reason in words, so that it reads like the system's own.
"""

import errno
import io
import os
import stat
from pathlib import Path

MAX_KEY_BYTES = 1 << 20
"""Files of keys."""
MAX_YAML_BYTES = 1 << 20
"""Configs: PyYAML takes about 20 seconds a megabyte at worst."""
MAX_LIST_BYTES = 1 << 24
"""Lists of checksums: over 100,000 files."""
MAX_INDEX_BYTES = 1 << 27
"""JSON with an entry for each tensor."""
MAX_VOCABULARY_BYTES = 1 << 28
"""Vocabularies."""
MAX_DATA_BYTES = 1 << 31
"""Prompts, and texts for calibration and evaluation."""

_KINDS = (
    (stat.S_ISREG, "a file"),
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a character device"),
    (stat.S_ISBLK, "a block device"),
)


def describe_kind(mode: int) -> str:
    """What a file of this `st_mode` is, in words."""
    return next((words for matches, words in _KINDS if matches(mode)), "a file of another kind")


def open_regular(path: Path) -> io.FileIO:
    """Open a regular file for unbuffered reading. Raises OSError for anything else; never blocks."""
    return io.FileIO(open_descriptor(path))


def open_descriptor(path: Path) -> int:
    """The descriptor of a regular file, for reading. Raises OSError for anything else; never blocks."""
    try:
        _require_regular(path, os.stat(path).st_mode)  # before opening: to open some devices has an effect
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
    """The whole content of a regular file. Raises OSError for another kind of file, or for one of more than `max_bytes`."""
    with io.BufferedReader(open_regular(path)) as file:
        size = os.fstat(file.fileno()).st_size
        # Files of /proc have a size of 0, and others may grow.
        content = b"" if size > max_bytes else file.read(max_bytes + 1)
    if size > max_bytes or len(content) > max_bytes:
        raise OSError(errno.EFBIG, f"it has {max(size, len(content))} bytes, but at most {max_bytes} are read", str(path))
    return content


def read_text(path: Path, max_bytes: int, *, encoding: str = "utf-8", errors: str = "strict") -> str:
    """The text of a regular file, line ends as \\n. Raises what `read_bytes` raises, and UnicodeDecodeError."""
    return io.TextIOWrapper(io.BytesIO(read_bytes(path, max_bytes)), encoding=encoding, errors=errors).read()


def _require_regular(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        number = errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL
        raise OSError(number, f"it is {describe_kind(mode)}, but a regular file is needed", str(path))
