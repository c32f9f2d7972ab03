"""The log folder of a run: private, and locked by one run at a time, so that two verdicts never mix.

If the default folder output/log is in use by another run, output/log-2 is used instead; a folder named by the user is an error.
"""

import os
import stat
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from launcher.host.file_errors import describe_os_error
from launcher.host.output_paths import check_output_folder
from launcher.host.path_lock import PathInUseError, hold
from parallel.errors import ConfigError

DEFAULT_LOG_DIR = Path("output/log")
_MAX_FOLDERS = 100


def check_log_folder(named: Path | None) -> None:
    """Raise ConfigError if the folder cannot be created or written. `named` is the user's folder; None means the default."""
    check_output_folder("--log-dir", named or DEFAULT_LOG_DIR)


@contextmanager
def open_log_folder(named: Path | None, *, is_first: bool, can_move: bool) -> Iterator[Path]:
    """Lock the folder for the duration of the block and return its absolute path. Raises ConfigError.

    `is_first`: whether this process represents its run; its other processes share the folder. `can_move`: whether this process alone
    determines the log folder, so that another default may be used.
    """
    with ExitStack() as stack:
        folder = (named or DEFAULT_LOG_DIR).absolute()
        try:
            if is_first:
                folder = _claim(stack, folder, can_move=named is None and can_move)
            _make_private(folder)
        except OSError as error:
            raise ConfigError(f"--log-dir cannot be written: {describe_os_error(error, folder)}") from None
        yield folder


def _claim(stack: ExitStack, folder: Path, *, can_move: bool) -> Path:
    for number in range(1, _MAX_FOLDERS + 1):
        found = folder if number == 1 else folder.with_name(f"{folder.name}-{number}")
        try:
            stack.enter_context(hold(found))
        except PathInUseError as error:
            if not can_move or number == _MAX_FOLDERS:
                raise ConfigError(f"--log-dir {folder} is in use by {error}; give each run another --log-dir") from None
            if number == 1:
                print(f"{folder} is in use by {error}; ", end="", file=sys.stderr)
            continue
        if number > 1:
            print(f"logs go to {found}", file=sys.stderr)
        break
    return found


def _make_private(folder: Path) -> None:
    if not folder.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)
        return
    before = folder.stat()
    # Do not change the mode of shared folders, such as /tmp or another user's.
    if before.st_uid == os.geteuid() and not before.st_mode & stat.S_ISVTX:
        folder.chmod(0o700)
