"""Rows of a MindSpore checkpoint's tensors, whose slices lie in one file or in the files of several ranks, encrypted or not.

Knows slices, bytes and how scales are encoded; no names.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from model.checkpoint.mindspore_encryption import EncryptedFile
from model.checkpoint.mindspore_header import ELEMENT_TYPES, StoredTensor
from parallel.errors import CheckpointError
from parallel.file_slices import FileReader, StoredRows


@dataclass(frozen=True, slots=True)
class RowBlock:
    """Whole rows of a tensor, or of some columns of it, as they are stored."""

    parts: list[StoredRows]
    """Bytes, for a slice of a file may end inside a row."""
    shape: tuple[int, ...]
    dtype: torch.dtype
    encrypted: Mapping[Path, EncryptedFile]
    """Files whose offsets are those of the plaintext."""

    def read(self, reader: FileReader, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop)."""
        row_bytes = prod(self.shape[1:]) * self.dtype.itemsize
        return self._read_bytes(reader, start * row_bytes, stop * row_bytes).view(self.dtype).view(stop - start, *self.shape[1:])

    def _read_bytes(self, reader: FileReader, start: int, stop: int) -> torch.Tensor:
        if not self.encrypted:
            return reader.read_rows(self.parts, start, stop)
        out = torch.empty(stop - start, dtype=torch.uint8)
        for part in self.parts:
            low, high = max(start, part.start), min(stop, part.stop)
            if low >= high:
                continue
            target, offset = out[low - start : high - start], part.offset_bytes + low - part.start
            if part.path in self.encrypted:
                self.encrypted[part.path].read_into(reader, offset, target)
            else:
                target.copy_(reader.read_span(part.path, offset, high - low))
        return out


def build_block(pieces: Iterable[tuple[Path, StoredTensor, int, int]], encrypted: Mapping[Path, EncryptedFile]) -> RowBlock:
    """Rows [first, stop) of each piece under each other. Raises CheckpointError for rows that a piece does not have."""
    parts: list[StoredRows] = []
    at, rows = 0, 0
    for file, stored, first, stop in pieces:
        shape, dtype = stored.dims, ELEMENT_TYPES[stored.tensor_type]
        if stop > shape[0]:
            raise CheckpointError(f"{file} holds {shape[0]} rows of a tensor beside another one of {stop}: copy or save it again")
        row_bytes, passed = prod(shape[1:]) * dtype.itemsize, 0
        begin, end = first * row_bytes, stop * row_bytes
        for offset, length in stored.slices:
            low, high = max(begin, passed), min(end, passed + length)
            if low < high:
                parts.append(StoredRows(file, offset + low - passed, at, at + high - low, (), torch.uint8))
                at += high - low
            passed += length
        rows += stop - first
    return RowBlock(parts or [StoredRows(file, 0, 0, 0, (), torch.uint8)], (rows, *shape[1:]), dtype, encrypted)


def make_column(scale: torch.Tensor) -> torch.Tensor:
    """[rows, 1] of [rows]."""
    return scale.view(-1, 1) if scale.dim() == 1 else scale


def decode_dequant_scale(stored: torch.Tensor) -> torch.Tensor:
    """float32 [rows, 1] of int64 [rows] whose low 32 bits are those of the float32."""
    if stored.dtype not in (torch.int64, torch.uint64):
        return make_column(stored)
    return stored.view(torch.float32).view(-1, 2)[:, :1].contiguous()
