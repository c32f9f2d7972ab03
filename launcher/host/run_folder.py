"""The folder through which a parent and its ranks exchange files. The folder of a killed parent is removed by the next run.

Its name is unguessable, and it is locked for the lifetime of its parent.
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
"""The path of a Unix socket is limited to 107 bytes, of which folder and socket use up to 27."""
_SHORT_PARENTS = (Path("/tmp"), Path("/var/tmp"), Path("/dev/shm"))


@contextmanager
def open_run_folder() -> Iterator[Path]:
    """Create a folder accessible only to this user and remove it after the block. Raises ConfigError if none can be created."""
    folder = _make_folder()
    with (folder / f"{_LOCK}.new").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (folder / f"{_LOCK}.new").rename(folder / _LOCK)  # renamed once locked, so that no other process finds it unlocked
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _make_folder() -> Path:
    """Create a folder in the temporary directory, or elsewhere if the path of a socket in it would be too long."""
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
    raise ConfigError(f"no usable folder for temporary files ({fault}): set TMPDIR to one")


def _remove_abandoned(parent: Path) -> None:
    """Remove this user's folders whose parents have exited, recognized by their free locks."""
    for folder in parent.glob(f"{_PREFIX}*"):
        with suppress(OSError), (folder / _LOCK).open("r+") as lock:
            if folder.stat().st_uid == os.getuid():
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
