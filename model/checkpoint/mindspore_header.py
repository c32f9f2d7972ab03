"""What a MindSpore `.ckpt` file holds: its tags, their shapes and types, and where their bytes lie.

Knows the bytes of the format (protobuf messages `Checkpoint`, one for each value or slice of one, and the CRC at the end); no names, no
ranks. The contents of tensors are skipped, not read, except that a CRC covers every byte: a file that carries one is read through once.
"""

import mmap
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from parallel.errors import CheckpointError

ELEMENT_TYPES: Mapping[str, torch.dtype] = {
    "Int8": torch.int8,
    "UInt8": torch.uint8,
    "Int16": torch.int16,
    "UInt16": torch.uint16,
    "Int32": torch.int32,
    "UInt32": torch.uint32,
    "Int64": torch.int64,
    "UInt64": torch.uint64,
    "Float16": torch.float16,
    "Float32": torch.float32,
    "Float64": torch.float64,
    "Bool": torch.bool,
    "BFloat16": torch.bfloat16,
    # One element a byte, whatever the name says.
    "Int4": torch.int8,
    # Early releases wrote the unsigned ones so.
    "Uint8": torch.uint8,
    "Uint16": torch.uint16,
    "Uint32": torch.uint32,
    "Uint64": torch.uint64,
}
"""By tensor_type. There is one more, STRING, whose content is UTF-32-LE."""
STRING = "str"

_ENCRYPTED = {0x7F3A5ED8: "AES-GCM", 0x7F3A5ED9: "AES-CBC", 0x7F3A5EDA: "SM4-CBC"}
"""First word of a file, little-endian."""
_CRC_MARK, _CRC_BYTES = b"crc_num", 10
_CHUNK_BYTES = 1 << 24
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
"""Wire types of protobuf. There are no others but groups, which this format does not have."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tag as the file describes it."""

    dims: tuple[int, ...]
    """Full shape; () for a scalar and for a `str`."""
    tensor_type: str
    """A key of ELEMENT_TYPES, or STRING."""
    slices: tuple[tuple[int, int], ...]
    """(offset_bytes, length_bytes) in the file; joined, they are the elements, row after row. One may end inside a row."""


def read_mindspore_header(path: Path) -> dict[str, StoredTensor]:
    """Every tag of a `.ckpt` file in file order.

    Raises CheckpointError for a file that is missing, empty, encrypted, cut off, damaged (its CRC differs, too) or none of this format.
    """
    try:
        size = path.stat().st_size
        if size == 0:
            raise CheckpointError(f"{path} is empty (0 bytes): copy or save it again")
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            cipher = _ENCRYPTED.get(int.from_bytes(data[:4], "little"))
            if cipher is not None:
                raise CheckpointError(f"{path} is encrypted ({cipher}), which is not supported yet: save it again without enc_key")
            end = size - len(_CRC_MARK) - _CRC_BYTES
            if end >= 0 and data[end : end + len(_CRC_MARK)] == _CRC_MARK:
                _check_crc(path, end, int.from_bytes(data[end + len(_CRC_MARK) : size], "big"))
            else:
                end = size
            return _Scanner(data, path, end).scan()
    except (FileNotFoundError, IsADirectoryError):
        raise CheckpointError(f"{path} is not a file") from None


def _check_crc(path: Path, end: int, expected: int) -> None:
    crc, left = 0, end
    # Plain reads: pages of a mapping would count as this process's memory.
    with path.open("rb", buffering=0) as file:
        while left and (chunk := file.read(min(left, _CHUNK_BYTES))):
            crc, left = zlib.crc32(chunk, crc), left - len(chunk)
    if crc != expected:
        raise CheckpointError(f"{path} is damaged: its CRC32 is {crc}, but the file says {expected}: copy it again")


class _Scanner:
    """Walks over the messages of a file."""

    def __init__(self, data: mmap.mmap, path: Path, end: int) -> None:
        self._data, self._path, self._end = data, path, end

    def scan(self) -> dict[str, StoredTensor]:
        found: dict[str, StoredTensor] = {}
        last = None
        for number, wire, start, stop in self._fields(0, self._end):
            if (number, wire) != (1, _BYTES):
                raise self._not_a_checkpoint(start)
            tag, tensor = self._read_value(start, stop)
            if tag in found:
                before = found[tag]
                if tag != last or (before.dims, before.tensor_type) != (tensor.dims, tensor.tensor_type):
                    raise CheckpointError(f"{self._path} holds {tag} twice, the second time before byte {stop}: save it again")
                tensor = StoredTensor(tensor.dims, tensor.tensor_type, before.slices + tensor.slices)
            found[tag] = tensor
            last = tag
        return {tag: self._finish(tag, tensor) for tag, tensor in found.items()}

    def _read_value(self, start: int, stop: int) -> tuple[str, StoredTensor]:
        tag, tensor = None, None
        for number, wire, first, last in self._fields(start, stop):
            if wire != _BYTES:
                continue
            if number == 1:
                tag = self._text(first, last)
            elif number == 2:
                tensor = self._read_tensor(first, last)
            elif number == 3:
                raise CheckpointError(f"{self._path} holds the map tensor {tag}, which is not supported: save it as a plain one")
        if tag is None or tensor is None:
            raise self._not_a_checkpoint(start)
        return tag, tensor

    def _read_tensor(self, start: int, stop: int) -> StoredTensor:
        dims: list[int] = []
        tensor_type, content = "", (stop, 0)
        for number, wire, first, last in self._fields(start, stop):
            if number == 1:
                # Not packed as MindSpore writes them; every protobuf reader has to take both.
                while first < last:
                    value, first = self._varint(first, last)
                    dims.append(value)
            elif number == 2 and wire == _BYTES:
                tensor_type = self._text(first, last)
            elif number == 3 and wire == _BYTES:
                content = (first, last - first)
        return StoredTensor(tuple(dims), tensor_type, (content,))

    def _finish(self, tag: str, tensor: StoredTensor) -> StoredTensor:
        """The tensor with the shape that its bytes have, checked."""
        stored = sum(length for _, length in tensor.slices)
        if tensor.tensor_type == STRING:
            return StoredTensor((), STRING, tensor.slices)
        dtype = ELEMENT_TYPES.get(tensor.tensor_type)
        if dtype is None:
            known = ", ".join(ELEMENT_TYPES)
            raise CheckpointError(f"{self._path}: {tag} has type {tensor.tensor_type!r}, but only {known} can be read")
        dims = () if tensor.dims == (0,) and stored else tensor.dims
        needed = prod(dims) * dtype.itemsize
        if stored != needed:
            raise CheckpointError(
                f"{self._path} holds {stored} bytes of {tag}, but {tensor.tensor_type} {list(dims)} has {needed}: copy or save it again"
            )
        return StoredTensor(dims, tensor.tensor_type, tensor.slices)

    def _fields(self, start: int, stop: int) -> Iterator[tuple[int, int, int, int]]:
        """(field number, wire type, first byte, one past the last byte) of each field of a message."""
        while start < stop:
            field = self._field(start, stop)
            yield field
            start = field[3]

    def _field(self, at: int, stop: int) -> tuple[int, int, int, int]:
        key, first = self._varint(at, stop)
        number, wire = key >> 3, key & 7
        if wire == _VARINT:
            last = self._varint(first, stop)[1]
        elif wire == _BYTES:
            length, first = self._varint(first, stop)
            last = first + length
        elif wire in (_FIXED32, _FIXED64):
            last = first + (4 if wire == _FIXED32 else 8)
        else:
            raise self._not_a_checkpoint(at)
        if last > stop:
            raise self._cut_off(last) if stop == self._end else self._not_a_checkpoint(at)
        return number, wire, first, last

    def _varint(self, at: int, stop: int) -> tuple[int, int]:
        """The number that begins at `at`, and where the next byte is."""
        value = 0
        for shift in range(0, 70, 7):
            if at >= stop:
                raise self._cut_off(at + 1) if stop == self._end else self._not_a_checkpoint(at)
            byte = self._data[at]
            value |= (byte & 0x7F) << shift
            at += 1
            if byte < 0x80:
                return value, at
        raise self._not_a_checkpoint(at)

    def _text(self, start: int, stop: int) -> str:
        try:
            return self._data[start:stop].decode("utf-8")
        except UnicodeDecodeError:
            raise self._not_a_checkpoint(start) from None

    def _cut_off(self, needed: int) -> CheckpointError:
        return CheckpointError(f"{self._path} has {self._end} bytes, but what it holds reaches byte {needed}: copy it again")

    def _not_a_checkpoint(self, at: int) -> CheckpointError:
        return CheckpointError(
            f"{self._path} is no MindSpore checkpoint, or damaged: byte {at} of {self._end} begins nothing of its format"
        )
