"""Read rows of a MindSpore checkpoint's tensors: runs of rows, whose slices are in one file or in several ranks' files, possibly encrypted.

Depends on slices, bytes and the encoding of scales; does not depend on tensor names.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

from model.checkpoint.mindspore_encryption import EncryptedFile
from model.checkpoint.mindspore_header import ELEMENT_TYPES, StoredTensor
from parallel.element_type import ElementType
from parallel.errors import CheckpointError
from parallel.file_slices import FileReader, StoredRows
from parallel.lazy_torch import torch

_SHORT_BYTES = 64
"""Shorter runs are read together with the gaps between them: a system call each would cost more than the extra bytes."""
_COVER_BYTES = 8 << 20
"""Maximum bytes per such read, unless a single run is longer."""


@dataclass(frozen=True, slots=True)
class RowRuns:
    """Rows of a stored tensor: `count` runs of `take` rows, starting `period` rows apart."""

    first: int
    """First row of the first run."""
    take: int
    """Rows per run."""
    period: int = 1
    """Distance between the starts of two runs, in rows."""
    count: int = 1
    """Number of runs."""

    @property
    def num_rows(self) -> int:
        """Number of rows in all runs."""
        return self.take * self.count

    @property
    def stop(self) -> int:
        """One past the last row."""
        return self.first + (self.count - 1) * self.period + self.take


@dataclass(frozen=True, slots=True)
class RowPiece:
    """Rows of one file's tensor, and their position in the assembled tensor."""

    start: int
    """First byte in the assembled tensor."""
    parts: Sequence[StoredRows]
    """Bytes by offset in the stored tensor: a slice may end within a row."""
    runs: RowRuns
    row_bytes: int

    @property
    def stop(self) -> int:
        """One past the last byte in the assembled tensor."""
        return self.start + self.runs.num_rows * self.row_bytes

    def list_runs(self, low: int, high: int) -> Iterator[tuple[int, int]]:
        """Return (first byte in the stored tensor, length) of bytes [low, high) of this piece, in order."""
        length, period, first = self.runs.take * self.row_bytes, self.runs.period * self.row_bytes, self.runs.first * self.row_bytes
        while low < high:
            run, inside = divmod(low, length)
            size = min(length - inside, high - low)
            yield first + run * period + inside, size
            low += size


@dataclass(frozen=True, slots=True)
class RowBlock:
    """Rows of a tensor, or of some of its columns, as stored."""

    pieces: Sequence[RowPiece]
    shape: tuple[int, ...]
    dtype: ElementType
    encrypted: Mapping[Path, EncryptedFile]
    """Files whose offsets refer to the plaintext."""

    def read(self, reader: FileReader, start: int, stop: int) -> torch.Tensor:
        """Return rows [start, stop)."""
        row_bytes = prod(self.shape[1:]) * self.dtype.itemsize
        first, last = start * row_bytes, stop * row_bytes
        out = torch.empty(last - first, dtype=torch.uint8)
        for piece in self.pieces:
            low, high = max(first, piece.start), min(last, piece.stop)
            if low < high:
                self._read_piece(reader, piece, low - piece.start, high - piece.start, out[low - first : high - first])
        return out.view(self.dtype.torch_dtype).view(stop - start, *self.shape[1:])

    def _read_piece(self, reader: FileReader, piece: RowPiece, low: int, high: int, out: torch.Tensor) -> None:
        runs = list(piece.list_runs(low, high))
        if len(runs) == 1:
            self._read_stored(reader, piece.parts, runs[0][0], out)
        elif piece.runs.take * piece.row_bytes >= _SHORT_BYTES and not self.encrypted:
            reader.read_spans(out, _locate(piece.parts, runs))
        else:
            self._read_covered(reader, piece.parts, runs, out)

    def _read_covered(self, reader: FileReader, parts: Sequence[StoredRows], runs: list[tuple[int, int]], out: torch.Tensor) -> None:
        """Read runs together with the gaps between them, in limited portions."""
        at, done = 0, 0
        while at < len(runs):
            begin, end = runs[at][0], at + 1
            while end < len(runs) and runs[end][0] + runs[end][1] - begin <= _COVER_BYTES:
                end += 1
            cover = torch.empty(runs[end - 1][0] + runs[end - 1][1] - begin, dtype=torch.uint8)
            self._read_stored(reader, parts, begin, cover)
            source, target = cover.numpy(), out.numpy()
            for first, length in runs[at:end]:
                target[done : done + length] = source[first - begin : first - begin + length]
                done += length
            at = end

    def _read_stored(self, reader: FileReader, parts: Sequence[StoredRows], start: int, out: torch.Tensor) -> None:
        """Read bytes of the stored tensor from `start` on."""
        if not self.encrypted:
            reader.read_into(out, parts, start)
            return
        for part in parts:
            low, high = max(start, part.start), min(start + len(out), part.stop)
            if low >= high:
                continue
            target, offset = out[low - start : high - start], part.offset_bytes + low - part.start
            if part.path in self.encrypted:
                self.encrypted[part.path].read_into(reader, offset, target)
            else:
                target.copy_(reader.read_span(part.path, offset, high - low))


def build_block(pieces: Iterable[tuple[Path, StoredTensor, RowRuns]], encrypted: Mapping[Path, EncryptedFile]) -> RowBlock:
    """Join the rows of the pieces. Raises CheckpointError for rows that a piece does not have."""
    found: list[RowPiece] = []
    at, rows = 0, 0
    for file, stored, runs in pieces:
        shape, dtype = stored.dims, ELEMENT_TYPES[stored.tensor_type]
        if runs.stop > shape[0]:
            raise CheckpointError(f"{file} holds {shape[0]} rows of a tensor beside another one of {runs.stop}: copy or save it again")
        row_bytes, passed = prod(shape[1:]) * dtype.itemsize, 0
        parts = []
        for (offset, length), place in zip(stored.slices, stored.files or [file] * len(stored.slices), strict=True):
            parts.append(StoredRows(place, offset, passed, passed + length, (), ElementType.UINT8))
            passed += length
        if runs.num_rows * row_bytes:
            found.append(RowPiece(at, parts, runs, row_bytes))
        at += runs.num_rows * row_bytes
        rows += runs.num_rows
    return RowBlock(found, (rows, *shape[1:]), dtype, encrypted)


def _locate(parts: Sequence[StoredRows], runs: Iterable[tuple[int, int]]) -> Iterator[tuple[Path, int, int]]:
    """Yield (file, offset, length) of runs of bytes of a stored tensor, in order."""
    number = 0
    for first, length in runs:
        stop = first + length
        while first < stop:
            while parts[number].stop <= first:
                number += 1
            part = parts[number]
            end = min(stop, part.stop)
            yield part.path, part.offset_bytes + first - part.start, end - first
            first = end


def make_column(scale: torch.Tensor) -> torch.Tensor:
    """Reshape [rows] to [rows, 1]."""
    return scale.view(-1, 1) if scale.dim() == 1 else scale


def decode_dequant_scale(stored: torch.Tensor) -> torch.Tensor:
    """Convert int64 [rows], whose low 32 bits are a float32, to float32 [rows, 1]."""
    if stored.dtype not in (torch.int64, torch.uint64):
        return make_column(stored)
    return stored.view(torch.float32).view(-1, 2)[:, :1].contiguous()
