"""The interface of all checkpoint formats: names, shapes and rows of tensors, under Hugging Face names.

`model/checkpoint/formats.py` holds the registry of formats.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from model.spec.tensor_info import TensorInfo
from parallel.file_slices import FileReader, StoredRows
from parallel.lazy_torch import torch

PIECE_BYTES = 64 << 20
"""Bytes of a tensor in memory at a time when processing whole checkpoints."""


@dataclass(frozen=True, slots=True)
class Checksum:
    """A recorded checksum of a file."""

    algorithm: str
    """A name in hashlib (sha256, md5), or crc32."""
    value: str
    """Hexadecimal."""
    recorded_in: str
    """Where it was recorded, for messages."""
    length_bytes: int | None = None
    """Number of bytes from the start that it covers; None: the whole file."""
    spans: tuple[tuple[int, int], ...] = ()
    """Offset and length of the spans that it covers, in order (a CRC of the spans' CRCs); empty: one contiguous range."""


class CheckpointSource(Protocol):
    """An opened checkpoint: headers have been read, tensors have not."""

    @property
    def path(self) -> Path:
        """The file or folder."""
        ...

    @property
    def config(self) -> dict[str, Any]:
        """Values of config.json, or the equivalent from the format's own metadata."""
        ...

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor, by its Hugging Face name."""
        ...

    @property
    def files(self) -> Sequence[Path]:
        """The files that hold tensors."""
        ...

    @property
    def checksums(self) -> Mapping[Path, Checksum]:
        """Recorded checksums of `files`; empty if there are none."""
        ...

    def read_rows(self, reader: FileReader, name: str, start: int, stop: int) -> torch.Tensor:
        """Return rows [start, stop) of a tensor."""
        ...

    def locate_rows(self, name: str, start: int, stop: int) -> Sequence[StoredRows]:
        """Return where the rows are stored, for `FileReader`; empty if they are converted or assembled."""
        ...

    def tokenizer_path(self) -> Path | None:
        """The folder or file that holds the tokenizer, if any."""
        ...


def read_pieces(source: CheckpointSource, reader: FileReader, name: str, start: int, stop: int) -> Iterator[torch.Tensor]:
    """Yield rows [start, stop) of a tensor in runs of at most PIECE_BYTES (at least one unit of rows); one empty run if there are none."""
    for first, end in cut_pieces(source.tensors[name], start, stop):
        yield source.read_rows(reader, name, first, end)


def cut_pieces(info: TensorInfo, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Yield the intervals of rows that `read_pieces` reads."""
    step = info.count_step_rows(PIECE_BYTES)
    yield start, min(start + step, stop)
    for first in range(start + step, stop, step):
        yield first, min(first + step, stop)
