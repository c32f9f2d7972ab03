"""SHA256SUMS: one hash per line for the files of a folder, in the format of `sha256sum -c`."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from model.checkpoint.source import Checksum
from parallel.errors import CheckpointError
from parallel.regular_file import MAX_LIST_BYTES, read_text

CHECKSUM_FILE = "SHA256SUMS"
_LINE = re.compile(r"([0-9a-fA-F]{64}) [ *](?:\./)?(.+)")


def read_sha256sums(folder: Path, files: Sequence[Path]) -> dict[Path, Checksum]:
    """Return the recorded checksums of those of `files` that are in `folder`. Raises CheckpointError for a malformed line."""
    path = folder / CHECKSUM_FILE
    if not path.exists():
        return {}
    try:
        lines = read_text(path, MAX_LIST_BYTES, errors="replace").splitlines()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    hashes = {}
    for number, line in enumerate(lines, 1):
        match = _LINE.fullmatch(line)
        if line and match is None:
            raise CheckpointError(f"{path}, line {number}: 64 hexadecimal digits and a file name are needed; make it with sha256sum")
        if match is not None:
            hashes[match[2]] = match[1].lower()
    return {file: Checksum("sha256", hashes[file.name], CHECKSUM_FILE) for file in files if file.name in hashes}


def write_sha256sums(folder: Path, hashes: Mapping[str, str]) -> None:
    """Write one line per file."""
    (folder / CHECKSUM_FILE).write_text("".join(f"{value}  {name}\n" for name, value in hashes.items()), encoding="utf-8")
