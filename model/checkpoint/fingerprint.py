"""Detect whether two opened checkpoints are the same model, or one was replaced in the meantime, without reading all of it.

`content` covers the model's settings (config and quantization scheme), the name, shape and dtype of every tensor, and samples of 4 KB:
of the first, the middle and the last row of every tensor, so that folders and rank files of the same tensors are equal; for formats that
convert their tensors, positions spread evenly over the files, three per tensor. `files` covers the size and modification time of each
file with tensors. A change between the samples that preserves size and modification time to the nanosecond goes undetected.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

from model.spec.tensor_info import TensorInfo
from parallel.errors import RunError
from parallel.file_slices import StoredRows

_SAMPLE_BYTES = 4096
_SAMPLES = 3
"""Samples per tensor."""
_SHOWN = 16
"""Hexadecimal digits kept of a hash."""


class Fingerprinted(Protocol):
    """What has a fingerprint: a checkpoint or an adapter."""

    @property
    def config(self) -> dict[str, Any]:
        """Values of its settings file."""
        ...

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor, by its name."""
        ...

    @property
    def files(self) -> Sequence[Path]:
        """The files that hold tensors."""
        ...

    def locate_rows(self, name: str, start: int, stop: int) -> Sequence[StoredRows]:
        """Return where the rows are stored; empty if they are converted or assembled."""
        ...


class CheckpointReplacedError(RunError):
    """The files of a checkpoint are not those with which the run was started."""


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """Fingerprint of one opened checkpoint."""

    content: str
    """Hash of settings, headers and samples, equal for copies on other hosts; empty: not computed."""
    config: str
    """Hash of the values of config.json."""
    files: Mapping[str, tuple[int, int]]
    """Size in bytes and modification time in nanoseconds of each file that holds tensors, by its path on this host."""

    @property
    def state(self) -> str:
        """Hash of everything but the content."""
        return _shorten(json.dumps([self.config, self.files]))


def read_state(source: Fingerprinted) -> Fingerprint:
    """Return the fingerprint without the content, using only `stat`. Raises OSError for a missing file."""
    stats = {str(file.absolute()): file.stat() for file in source.files}
    config = _shorten(json.dumps(source.config, sort_keys=True, default=str))
    return Fingerprint("", config, {path: (stat.st_size, stat.st_mtime_ns) for path, stat in stats.items()})


def read_fingerprint(source: Fingerprinted, *settings: Any) -> Fingerprint:
    """Return the full fingerprint, reading three samples of each tensor. `settings`: dataclasses. Raises OSError for unreadable files."""
    state, digest = read_state(source), hashlib.sha256()
    digest.update(json.dumps([asdict(one) for one in settings], sort_keys=True, default=str).encode())
    for name, info in sorted(source.tensors.items()):
        digest.update(f"{name} {list(info.shape)} {info.dtype_name}\n".encode())
    opened: dict[Path, int] = {}
    with ExitStack() as stack:
        for path, offset, size in _list_samples(source):
            if path not in opened:
                opened[path] = os.open(path, os.O_RDONLY)
                stack.callback(os.close, opened[path])
            digest.update(os.pread(opened[path], size, offset))
    return Fingerprint(digest.hexdigest()[:_SHOWN], state.config, state.files)


def _list_samples(source: Fingerprinted) -> Iterator[tuple[Path, int, int]]:
    """Return (file, first byte, bytes) of every sample."""
    places = []
    for name, info in sorted(source.tensors.items()):
        num_rows = info.shape[0] if info.shape else 1
        for row in sorted({0, num_rows // 2, num_rows - 1}) if num_rows else ():
            part = next((part for part in source.locate_rows(name, row, row + 1) if part.start <= row < part.stop), None)
            if part is None:
                yield from _spread_samples(source)
                return
            places.append((part.path, part.offset_bytes + (row - part.start) * part.row_bytes, min(_SAMPLE_BYTES, part.row_bytes)))
    yield from places


def _spread_samples(source: Fingerprinted) -> Iterator[tuple[Path, int, int]]:
    """Return evenly spaced positions over all files, including the first and the last bytes of each."""
    sizes = {file: file.stat().st_size for file in source.files}
    step = max(_SAMPLE_BYTES, sum(sizes.values()) // (_SAMPLES * max(1, len(source.tensors))))
    for file, size in sizes.items():
        yield from ((file, offset, _SAMPLE_BYTES) for offset in range(0, size, step))
        yield file, max(0, size - _SAMPLE_BYTES), _SAMPLE_BYTES


def check_unchanged(before: Fingerprint, read: Callable[[], Fingerprint]) -> None:
    """Raise CheckpointReplacedError with both fingerprints and the difference, unless `read` returns the checkpoint of `before`.

    Contents are compared if both have one.
    """
    try:
        now = read()
    except (OSError, ValueError) as error:  # InputError is a ValueError
        raise CheckpointReplacedError(
            f"the checkpoint was replaced during the run and can no longer be opened ({error}): its fingerprint was "
            f"{before.content or before.state} at the start"
        ) from None
    words = _describe_change(before, now)
    if words is not None:
        by_content = "" not in (before.content, now.content) and before.content != now.content
        first, second = (one.content if by_content else one.state for one in (before, now))
        raise CheckpointReplacedError(
            f"the checkpoint was replaced during the run ({words}): its fingerprint was {first} at the start and is {second} now; "
            "start again to use the new one"
        )


def _describe_change(before: Fingerprint, now: Fingerprint) -> str | None:
    for path, (size, time) in now.files.items():
        if path not in before.files:
            return f"{path} is new"
        if before.files[path] != (size, time):
            was, when = before.files[path][0], datetime.fromtimestamp(time / 1e9).isoformat(" ", "seconds")
            return f"{path} has {size} bytes, modified {when}, and had {was}"
    if len(now.files) < len(before.files):
        return f"{next(path for path in before.files if path not in now.files)} is gone"
    if before.config != now.config:
        return "its config has other values"
    return "its weights differ" if "" not in (before.content, now.content) and before.content != now.content else None


def _shorten(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:_SHOWN]
