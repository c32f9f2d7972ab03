"""Verify the files of an opened checkpoint against recorded checksums, and check every element of its tensors.

Does not depend on formats or the config; `model/spec/weights.py` checks whether tensors match a model.
"""

import hashlib
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from model.checkpoint.source import CheckpointSource, Checksum, cut_pieces
from model.checkpoint.stored_values import decode_values, read_stored
from parallel.errors import CheckpointError
from parallel.file_slices import FileReader
from parallel.regular_file import open_regular

_CHUNK_BYTES = 16 << 20
_DECODED_BYTES = 1 << 20

Progress = Callable[[int, int], None]
"""Called with (bytes done, total bytes)."""


@dataclass(frozen=True, slots=True)
class FileCheck:
    """Result for one hashed file."""

    name: str
    """Relative to the checkpoint."""
    size_bytes: int
    sha256: str
    recorded_in: str | None
    """Where its checksum was recorded; None: nowhere."""
    recorded: str | None
    """The recorded checksum."""
    found: str | None
    """The current checksum by the same algorithm."""

    @property
    def is_intact(self) -> bool:
        """False when it differs from the recorded checksum."""
        return self.recorded == self.found


@dataclass(frozen=True, slots=True)
class TensorCheck:
    """Result for one tensor, read in full."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    sha256: str
    """Hash of its elements, row-major, little-endian: the same in every format with the same tensor."""
    num_nan: int
    num_infinite: int


def check_files(source: CheckpointSource, on_progress: Progress = lambda done, total: None) -> list[FileCheck]:
    """Read and hash every file sequentially."""
    sizes = [file.stat().st_size for file in source.files]
    done, total, checks = 0, sum(sizes), []
    for file, size in zip(source.files, sizes, strict=True):
        recorded = source.checksums.get(file)
        whole, other = hashlib.sha256(), _start_hash(recorded) if recorded and recorded.algorithm != "sha256" else None
        left = recorded.length_bytes if recorded and recorded.length_bytes is not None else size
        for chunk in _read_chunks(file):
            whole.update(chunk)
            if other is not None:
                other.update(chunk[:left])
                left -= min(left, len(chunk))
            done += len(chunk)
            on_progress(min(done, total), total)
        found = (other or whole).hexdigest() if recorded else None
        name = str(file.relative_to(source.path)) if file != source.path and source.path in file.parents else file.name
        where, value = (recorded.recorded_in, recorded.value) if recorded else (None, None)
        checks.append(FileCheck(name, size, whole.hexdigest(), where, value, found))
    return checks


def require_intact(source: CheckpointSource, on_progress: Progress = lambda done, total: None) -> None:
    """Raise CheckpointError when a file differs from its recorded checksum."""
    if not source.checksums:
        return
    checks = check_files(source, on_progress)
    damaged = [check for check in checks if not check.is_intact]
    if damaged:
        raise CheckpointError(describe_damage(damaged[0]) + (f"; {len(damaged)} of {len(checks)} files differ" if len(damaged) > 1 else ""))


def describe_damage(check: FileCheck) -> str:
    """Describe how a file is damaged."""
    return f"{check.name} is damaged: its checksum is {check.found}, but {check.recorded_in} says {check.recorded}: copy it again"


def check_tensors(
    source: CheckpointSource, num_threads: int, *, deep: bool, on_progress: Progress = lambda done, total: None
) -> list[TensorCheck]:
    """Read and hash every tensor, one piece at a time per thread. `deep`: also count non-finite elements.

    Raises CheckpointError for unreadable data.
    """
    names = list(source.tensors)
    total, done, checks = sum(info.num_bytes for info in source.tensors.values()), 0, []
    with ThreadPoolExecutor(num_threads) as pool:
        for check in pool.map(lambda name: _check_tensor(source, name, deep=deep), names):
            checks.append(check)
            done += source.tensors[check.name].num_bytes
            on_progress(done, total)
    return checks


def _check_tensor(source: CheckpointSource, name: str, *, deep: bool) -> TensorCheck:
    info, digest, num_nan, num_infinite = source.tensors[name], hashlib.sha256(), 0, 0
    reader = FileReader()
    try:
        for start, stop in cut_pieces(info, 0, info.shape[0] if info.shape else 1):
            stored = read_stored(source, reader, name, start, stop).reshape(-1)
            digest.update(stored.data)
            # Decoding widens the elements, so only a few at a time.
            for first in range(0, len(stored) if deep and info.dtype.is_floating_point else 0, _DECODED_BYTES):
                values = decode_values(stored[first : first + _DECODED_BYTES], info.dtype)
                num_nan += int(np.count_nonzero(np.isnan(values)))
                num_infinite += int(np.count_nonzero(np.isinf(values)))
    finally:
        reader.close()
    return TensorCheck(name, info.dtype_name, info.shape, digest.hexdigest(), num_nan, num_infinite)


class _Crc32:
    def __init__(self) -> None:
        self._value = 0

    def update(self, data: bytes) -> None:
        self._value = zlib.crc32(data, self._value)

    def hexdigest(self) -> str:
        return f"{self._value:08x}"


class _SpansCrc32:
    """CRC of the CRCs of spans of a file, computed from all its bytes in order."""

    def __init__(self, spans: Sequence[tuple[int, int]]) -> None:
        self._spans, self._values, self._at, self._current = spans, [0] * len(spans), 0, 0

    def update(self, data: bytes) -> None:
        view, end = memoryview(data), self._at + len(data)
        while self._current < len(self._spans):
            begin, length = self._spans[self._current]
            first, last = max(begin, self._at), min(begin + length, end)
            if first < last:
                self._values[self._current] = zlib.crc32(view[first - self._at : last - self._at], self._values[self._current])
            if begin + length > end:
                break
            self._current += 1
        self._at = end

    def hexdigest(self) -> str:
        return f"{zlib.crc32(b''.join(value.to_bytes(4, 'little') for value in self._values)):08x}"


def _start_hash(recorded: Checksum) -> Any:
    if recorded.spans:
        return _SpansCrc32(recorded.spans)
    return _Crc32() if recorded.algorithm == "crc32" else hashlib.new(recorded.algorithm, usedforsecurity=False)


def _read_chunks(file: Path) -> Iterator[bytes]:
    # Use plain reads: mapped pages would count as memory of this process.
    with open_regular(file) as opened:
        while chunk := opened.read(_CHUNK_BYTES):
            yield chunk


def list_not_numbers(checks: Sequence[TensorCheck]) -> list[str]:
    """Describe the tensors with non-finite elements."""
    return [
        f"{check.name} holds {check.num_nan} NaN and {check.num_infinite} infinite values"
        for check in checks
        if check.num_nan or check.num_infinite
    ]
