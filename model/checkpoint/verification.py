"""Holds the files of an opened checkpoint against what was recorded of them, and looks at every element of its tensors.

Knows sources, checksums and tensors; no formats, no config: whether tensors fit a model is `model/spec/weights.py`'s business.
"""

import hashlib
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from model.checkpoint.source import CheckpointSource, read_pieces
from parallel.errors import CheckpointError
from parallel.file_slices import FileReader

_CHUNK_BYTES = 16 << 20

Progress = Callable[[int, int], None]
"""Gets (bytes done, bytes in all)."""


@dataclass(frozen=True, slots=True)
class FileCheck:
    """One file, hashed."""

    name: str
    """Relative to the checkpoint."""
    size_bytes: int
    sha256: str
    recorded_in: str | None
    """Where a checksum of it was recorded; None: nowhere."""
    recorded: str | None
    """What was recorded."""
    found: str | None
    """What the same algorithm gives now."""

    @property
    def is_intact(self) -> bool:
        """False when it differs from what was recorded."""
        return self.recorded == self.found


@dataclass(frozen=True, slots=True)
class TensorCheck:
    """One tensor, read whole."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    sha256: str
    """Of its elements, row after row, little-endian: the same in every format that holds the same tensor."""
    num_nan: int
    num_infinite: int


def check_files(source: CheckpointSource, on_progress: Progress = lambda done, total: None) -> list[FileCheck]:
    """Read every file once, front to back."""
    sizes = [file.stat().st_size for file in source.files]
    done, total, checks = 0, sum(sizes), []
    for file, size in zip(source.files, sizes, strict=True):
        recorded = source.checksums.get(file)
        whole, other = hashlib.sha256(), _start_hash(recorded.algorithm) if recorded and recorded.algorithm != "sha256" else None
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
    """Raise CheckpointError when a file differs from what was recorded of it."""
    if not source.checksums:
        return
    checks = check_files(source, on_progress)
    damaged = [check for check in checks if not check.is_intact]
    if damaged:
        raise CheckpointError(describe_damage(damaged[0]) + (f"; {len(damaged)} of {len(checks)} files differ" if len(damaged) > 1 else ""))


def describe_damage(check: FileCheck) -> str:
    """What is wrong with a file that is not intact."""
    return f"{check.name} is damaged: its checksum is {check.found}, but {check.recorded_in} says {check.recorded}: copy it again"


def check_tensors(
    source: CheckpointSource, num_threads: int, *, deep: bool, on_progress: Progress = lambda done, total: None
) -> list[TensorCheck]:
    """Read and hash every tensor, a piece at a time on each thread. `deep`: count what is not a number, too.

    Raises CheckpointError for what cannot be read.
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
        for piece in read_pieces(source, reader, name, 0, info.shape[0] if info.shape else 1):
            digest.update(piece.contiguous().reshape(-1).view(torch.uint8).numpy().data)
            if deep and piece.is_floating_point():
                num_nan += int(piece.isnan().sum())
                num_infinite += int(piece.isinf().sum())
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


def _start_hash(algorithm: str) -> Any:
    return _Crc32() if algorithm == "crc32" else hashlib.new(algorithm, usedforsecurity=False)


def _read_chunks(file: Path) -> Iterator[bytes]:
    # Plain reads: pages of a mapping would count as this process's memory.
    with file.open("rb", buffering=0) as opened:
        while chunk := opened.read(_CHUNK_BYTES):
            yield chunk


def list_not_numbers(checks: Sequence[TensorCheck]) -> list[str]:
    """In words, the tensors that hold what is not a number."""
    return [
        f"{check.name} holds {check.num_nan} NaN and {check.num_infinite} infinite values"
        for check in checks
        if check.num_nan or check.num_infinite
    ]
