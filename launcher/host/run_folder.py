"""The folder in which a parent and its ranks leave things for each other. That of a parent that was killed is removed by the next run.

Knows a folder with a name that cannot be guessed, and a lock that ends with its holder; not what lies in it.
"""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from launcher.host.file_errors import describe_os_error
from parallel.errors import ConfigError

_PREFIX = "tandem-"
_LOCK = "lock"
_MAX_PARENT_BYTES = 80
"""The path of a Unix socket has at most 107 bytes, of which folder and socket take up to 27."""
_SHORT_PARENTS = (Path("/tmp"), Path("/var/tmp"), Path("/dev/shm"))


@contextmanager
def open_run_folder() -> Iterator[Path]:
    """A new folder, only this user's, gone at the end of the block. Raises ConfigError where none can be made."""
    folder = _make_folder()
    with (folder / f"{_LOCK}.new").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (folder / f"{_LOCK}.new").rename(folder / _LOCK)  # so that nobody finds it before it is held
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _make_folder() -> Path:
    """A new folder among the temporary files, or elsewhere where a socket in it would have too long a path."""
    fault = ""
    try:
        chosen = Path(tempfile.gettempdir())
        fault = f"{chosen}: its path has over {_MAX_PARENT_BYTES} bytes"
        for parent in (chosen, *_SHORT_PARENTS):
            if len(os.fsencode(parent)) <= _MAX_PARENT_BYTES and parent.is_dir():
                _remove_abandoned(parent)
                return Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
    except OSError as error:
        fault = describe_os_error(error)
    raise ConfigError(f"there is no usable folder for temporary files ({fault}): set TMPDIR to one")


def _remove_abandoned(parent: Path) -> None:
    """Remove this user's folders whose parents have ended: nobody holds their locks."""
    for folder in parent.glob(f"{_PREFIX}*"):
        with suppress(OSError), (folder / _LOCK).open("r+") as lock:
            if folder.stat().st_uid == os.getuid():
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
