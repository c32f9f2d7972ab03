"""Lock that keeps two runs from writing to the same path: a file next to it that names the holder, released when the holder exits.

flock(2) works within a host and, on Linux, also over NFS. The path itself is not written.
"""

import errno
import fcntl
import hashlib
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_LONGEST_NAME_BYTES = 240


class PathInUseError(Exception):
    """Another run holds the lock. The message names its process id and host."""


@contextmanager
def hold(path: Path) -> Iterator[None]:
    """Lock a file or folder, which need not exist yet. Raises PathInUseError, OSError.

    Creates missing parents, and removes them afterwards if nothing was written into them. Warns if the file system does not support locks.
    """
    target = Path(os.path.realpath(path))
    made = [parent for parent in target.parents if not parent.exists()]
    lock, descriptor = target.with_name(_lock_name(target.name)), None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _acquire(lock)
        yield
    finally:
        if descriptor is not None:
            lock.unlink(missing_ok=True)  # still locked, so no other process can have acquired it
            os.close(descriptor)
        with suppress(OSError):
            for parent in made:
                parent.rmdir()


def _lock_name(name: str) -> str:
    encoded = os.fsencode(name)
    return f".{name}.lock" if len(encoded) <= _LONGEST_NAME_BYTES else f".{hashlib.sha256(encoded).hexdigest()}.lock"


def _acquire(lock: Path) -> int | None:
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_current(lock, descriptor):
                _write_holder(lock, descriptor)
                return descriptor
        except BlockingIOError:
            holder = _read_holder(descriptor)
            os.close(descriptor)
            raise PathInUseError(holder) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS):
                os.close(descriptor)
                raise OSError(error.errno, error.strerror, str(lock)) from None
            print(f"warning: {lock.parent} has no file locks: do not let two runs write there", file=sys.stderr)
        except BaseException:
            os.close(descriptor)
            raise
        else:
            os.close(descriptor)  # the holder has just removed it: try the next one
            continue
        os.close(descriptor)
        return None


def _write_holder(lock: Path, descriptor: int) -> None:
    try:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, json.dumps({"pid": os.getpid(), "host": os.uname().nodename}).encode())
    except OSError:  # a full disk
        lock.unlink(missing_ok=True)
        raise


def _is_current(lock: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(lock), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _read_holder(descriptor: int) -> str:
    try:
        found = json.loads(os.pread(descriptor, 4096, 0))
        return f"process {int(found['pid'])} on {found['host']!s:.100}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
