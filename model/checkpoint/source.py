"""What every checkpoint format gives: names, shapes and rows of tensors, under Hugging Face names.

Knows no format; `model/checkpoint/formats.py` holds the table of formats.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from model.spec.tensor_info import TensorInfo
from parallel.file_slices import FileReader, StoredRows

PIECE_BYTES = 64 << 20
"""Whoever goes through whole checkpoints holds so much of a tensor at a time."""


@dataclass(frozen=True, slots=True)
class Checksum:
    """What was recorded of a file when it was written."""

    algorithm: str
    """A name of hashlib (sha256, md5), or crc32."""
    value: str
    """Hexadecimal."""
    recorded_in: str
    """Where it stands, for messages."""
    length_bytes: int | None = None
    """It covers so many bytes from the start; None: the whole file."""
    spans: tuple[tuple[int, int], ...] = ()
    """First byte and length of the parts that it covers, in order: the CRC of the CRCs of each; empty: one run of bytes."""


class CheckpointSource(Protocol):
    """An opened checkpoint: headers are read, tensors are not."""

    @property
    def path(self) -> Path:
        """The file or folder."""
        ...

    @property
    def config(self) -> dict[str, Any]:
        """Values of config.json, or what the format's own metadata gives in its place."""
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
        """What is recorded of `files`; empty where nothing is."""
        ...

    def read_rows(self, reader: FileReader, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of a tensor."""
        ...

    def locate_rows(self, name: str, start: int, stop: int) -> Sequence[StoredRows]:
        """Where they lie as `read_rows` gives them, for `FileReader`; empty where they are converted or put together."""
        ...

    def tokenizer_path(self) -> Path | None:
        """The folder or file that holds the tokenizer, if any."""
        ...


def read_pieces(source: CheckpointSource, reader: FileReader, name: str, start: int, stop: int) -> Iterator[torch.Tensor]:
    """Rows [start, stop) of a tensor in runs of at most PIECE_BYTES (a longer row alone); one of no rows where there are none."""
    info = source.tensors[name]
    rows = info.shape[0] if info.shape else 1
    step = max(1, PIECE_BYTES * rows // max(1, info.num_bytes))
    yield source.read_rows(reader, name, start, min(start + step, stop))
    for first in range(start + step, stop, step):
        yield source.read_rows(reader, name, first, min(first + step, stop))
