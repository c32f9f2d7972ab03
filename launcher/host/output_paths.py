"""Checks, before anything starts, that output files and folders are writable.

Uses a probe file, created and removed in the nearest existing folder. Writes no results.
"""

import errno
import os
import secrets
from pathlib import Path

from launcher.host.atomic_write import needs_direct_writing
from launcher.host.file_errors import describe_os_error
from parallel.errors import ConfigError


def check_output_file(option: str, path: Path | None) -> None:
    """Raise ConfigError naming `option`, unless `path` is None or a file that can be written or created."""
    if path is None:
        return
    try:
        if needs_direct_writing(path):
            if not os.access(path, os.W_OK):
                raise PermissionError(None, "it is not writable", str(path))
            return
        target = Path(os.path.realpath(path))
        if target.exists() and not os.access(target, os.W_OK):
            raise PermissionError(None, "it is not writable", str(path))
        try_folder(target.parent)
        try_name(target)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{option} cannot be written: {_describe(error, path)}") from None


def check_output_folder(option: str, path: Path) -> None:
    """Raise ConfigError naming `option`, unless `path` is a folder that can be written or created."""
    try:
        target = Path(os.path.realpath(path))
        try_folder(target)
        try_name(target)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{option} cannot be written: {_describe(error, path)}") from None


def try_folder(folder: Path) -> None:
    """Create and remove a file in the nearest existing folder. Raises OSError if the folder cannot be created or written."""
    try_name(folder)
    while not os.path.lexists(folder):
        folder = folder.parent
    if not folder.is_dir():
        raise NotADirectoryError(None, "it is not a folder", str(folder))
    probe = folder / f".partial-{secrets.token_hex(8)}"
    try:
        os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    except OSError as error:
        reason = "no file can be created there" if error.errno == errno.ENOENT else error.strerror
        raise OSError(error.errno, reason, str(folder)) from None
    probe.unlink()


def try_name(path: Path) -> None:
    """Raise OSError for a name that is too long, or a circular link."""
    try:
        os.stat(path)
    except FileNotFoundError:
        pass


def _describe(error: OSError | ValueError, path: Path) -> str:
    if isinstance(error, OSError):
        return describe_os_error(error, path)
    return f"{str(path)!r}: a path cannot hold a null byte"
