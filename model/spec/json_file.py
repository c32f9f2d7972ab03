"""Read the small files of a checkpoint under limits: JSON objects, text and bytes.

A checkpoint is untrusted: a file may be a FIFO, a device, gigabytes long, not UTF-8, or nested too deeply. Each case raises a
CheckpointError with one sentence.
"""

import json
import stat
from pathlib import Path
from typing import Any

from model.spec.quoting import quote
from parallel.errors import CheckpointError

MAX_SETTINGS_BYTES = 16_000_000
"""Maximum size of a settings file; real ones are up to 2 MB."""
MAX_VOCABULARY_BYTES = 200_000_000
"""Maximum size of a vocabulary file; real ones are up to 40 MB."""


def read_file_bytes(path: Path, max_bytes: int = MAX_SETTINGS_BYTES) -> bytes:
    """Read the bytes of a regular file. Raises FileNotFoundError when it is missing, CheckpointError for everything else."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{path} is not a regular file")
        if status.st_size > max_bytes:
            raise CheckpointError(f"{path} has {status.st_size} bytes, more than the {max_bytes} that such a file may have")
        with path.open("rb") as file:
            return file.read(max_bytes)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None


def read_file_text(path: Path, max_bytes: int = MAX_SETTINGS_BYTES) -> str:
    """Read a UTF-8 text file. Raises the errors of `read_file_bytes`."""
    try:
        return read_file_bytes(path, max_bytes).decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}") from None


def parse_json_object(text: str, path: Path) -> dict[str, Any]:
    """Parse a JSON object. Raises CheckpointError naming `path`."""
    try:
        raw = json.loads(text)
    except RecursionError:
        raise CheckpointError(f"{path} is nested too deeply to be read") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from None
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path} holds {quote(raw)}, but a JSON object is needed")
    return raw


def read_optional_text(path: Path) -> str | None:
    """Read a settings file; None if it does not exist. Raises CheckpointError, also for a dangling link."""
    try:
        return read_file_text(path)
    except FileNotFoundError:
        if path.is_symlink():
            raise CheckpointError(f"{path} is a link to a file that does not exist") from None
        return None


def read_optional_object(path: Path) -> dict[str, Any]:
    """Read the JSON object in a settings file; empty if the file does not exist. Raises the errors of `read_optional_text`."""
    text = read_optional_text(path)
    return {} if text is None else parse_json_object(text, path)
