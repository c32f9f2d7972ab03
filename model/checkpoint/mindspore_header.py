"""Parse a MindSpore `.ckpt` file: its tags, their shapes and dtypes, and the location of their bytes.

The format is a sequence of protobuf messages `Checkpoint`, one per value or slice of a value, and a final CRC. Tensor contents are
skipped; the CRC, which covers every byte, is returned but not verified.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

from model.checkpoint.mindspore_encryption import CIPHERS, MAGIC_BYTES, EncryptedFile
from model.checkpoint.source import Checksum
from parallel.element_type import ElementType
from parallel.errors import CheckpointError
from parallel.file_slices import FileReader
from parallel.lazy_torch import torch

ELEMENT_TYPES: Mapping[str, ElementType] = {
    "Int8": ElementType.INT8,
    "UInt8": ElementType.UINT8,
    "Int16": ElementType.INT16,
    "UInt16": ElementType.UINT16,
    "Int32": ElementType.INT32,
    "UInt32": ElementType.UINT32,
    "Int64": ElementType.INT64,
    "UInt64": ElementType.UINT64,
    "Float16": ElementType.FLOAT16,
    "Float32": ElementType.FLOAT32,
    "Float64": ElementType.FLOAT64,
    "Bool": ElementType.BOOL,
    "BFloat16": ElementType.BFLOAT16,
    # Stored as one byte per element, despite the name.
    "Int4": ElementType.INT8,
    # Early releases wrote unsigned types under these names.
    "Uint8": ElementType.UINT8,
    "Uint16": ElementType.UINT16,
    "Uint32": ElementType.UINT32,
    "Uint64": ElementType.UINT64,
}
"""By tensor_type. One more type, STRING, holds UTF-32-LE text."""
STRING = "str"
TYPE_NAMES: Mapping[ElementType, str] = {dtype: name for name, dtype in reversed(list(ELEMENT_TYPES.items()))}
"""The tensor_type of each element type."""

# For Checkpoint, Value and TensorProto, in this order.
VALUE = 1
TAG, TENSOR, MAP_TENSOR = 1, 2, 3
DIMS, TENSOR_TYPE, TENSOR_CONTENT = 1, 2, 3
CRC_MARK, CRC_BYTES = b"crc_num", 10
"""At the end, followed by the big-endian CRC32 of all preceding bytes."""
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
"""Wire types of protobuf. The only others are groups, which this format does not use."""
_WINDOW_BYTES = 4096
_MAX_TEXT_BYTES, _MAX_DIMS = 4096, 64
"""Maximum length of a name, and number of dimensions of a tensor."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tag as described by the file."""

    dims: tuple[int, ...]
    """Full shape; () for a scalar and for a `str`."""
    tensor_type: str
    """A key of ELEMENT_TYPES, or STRING."""
    slices: tuple[tuple[int, int], ...]
    """(offset_bytes, length_bytes) in the file; concatenated, they are the elements in row-major order. A slice may end within a row."""
    files: tuple[Path, ...] = ()
    """The file of each slice, for a tensor of several files; empty: all are in one."""


@dataclass(frozen=True, slots=True)
class MindSporeHeader:
    """One file."""

    tensors: Mapping[str, StoredTensor]
    """In file order."""
    checksum: Checksum | None
    """The file's CRC; None for an encrypted file, where MindSpore writes 0."""
    encrypted: EncryptedFile | None
    """If set, offsets refer to the plaintext and this reads it."""


def read_mindspore_header(path: Path, reader: FileReader, key_file: Path | None = None) -> MindSporeHeader:
    """Read every tag of a `.ckpt` file.

    Raises CheckpointError for a file that is missing, empty, truncated, corrupt, of another format, or encrypted without a matching key.
    """

    def read_stored(at: int, length: int) -> bytes:
        return reader.read_span(path, at, length).numpy().tobytes()

    try:
        size = path.stat().st_size
        if size == 0:
            raise CheckpointError(f"{path} is empty (0 bytes): copy or save it again")
        cipher = CIPHERS.get(int.from_bytes(read_stored(0, min(size, MAGIC_BYTES)), "little"))
        end, crc = _find_crc(read_stored, size)
    except OSError as error:
        raise CheckpointError(f"{path} is not a file that can be read: {error.strerror}") from None
    if cipher is None:
        checksum = Checksum("crc32", crc, "the file's own CRC", end) if crc else None
        return MindSporeHeader(_Scanner(read_stored, path, end).scan(), checksum, None)
    if key_file is None:
        raise CheckpointError(f"{path} is encrypted ({cipher}); give the key with --key-file")
    # MindSpore writes its CRC after the blocks, but reads it inside them.
    encrypted = EncryptedFile(path, end, cipher, key_file, reader)

    def read_plain(at: int, length: int) -> bytes:
        out = torch.empty(length, dtype=torch.uint8)
        encrypted.read_into(reader, at, out)
        return out.numpy().tobytes()

    end, _ = _find_crc(read_plain, encrypted.size_bytes)
    return MindSporeHeader(_Scanner(read_plain, path, end).scan(), None, encrypted)


def _find_crc(read: Callable[[int, int], bytes], size: int) -> tuple[int, str]:
    """Return the end of the messages, and the CRC after them in hexadecimal; empty if there is none."""
    end = size - len(CRC_MARK) - CRC_BYTES
    tail = read(end, size - end) if end >= 0 else b""
    if not tail.startswith(CRC_MARK):
        return size, ""
    return end, f"{int.from_bytes(tail[len(CRC_MARK) :], 'big'):08x}"


class _Scanner:
    """Scanner over the messages of a file."""

    def __init__(self, read: Callable[[int, int], bytes], path: Path, end: int) -> None:
        """`read` returns bytes of the file, given offset and count."""
        self._read, self._path, self._end = read, path, end
        self._window, self._window_start = b"", 0

    def scan(self) -> dict[str, StoredTensor]:
        found: dict[str, tuple[StoredTensor, list[tuple[int, int]]]] = {}
        last = None
        for number, wire, start, stop in self._fields(0, self._end):
            if (number, wire) != (VALUE, BYTES):
                raise self._not_a_checkpoint(start)
            tag, tensor = self._read_value(start, stop)
            before, slices = found.setdefault(tag, (tensor, []))
            if slices and (tag != last or (before.dims, before.tensor_type) != (tensor.dims, tensor.tensor_type)):
                raise CheckpointError(f"{self._path} holds {tag} twice, the second time before byte {stop}: save it again")
            slices += tensor.slices
            last = tag
        return {tag: self._finish(tag, tensor, tuple(slices)) for tag, (tensor, slices) in found.items()}

    def _read_value(self, start: int, stop: int) -> tuple[str, StoredTensor]:
        tag, tensor = None, None
        for number, wire, first, last in self._fields(start, stop):
            if wire != BYTES:
                continue
            if number == TAG:
                tag = self._text(first, last)
            elif number == TENSOR:
                tensor = self._read_tensor(first, last)
            elif number == MAP_TENSOR:
                raise CheckpointError(f"{self._path} holds the map tensor {tag}, which is not supported: save it as a plain one")
        if tag is None or tensor is None:
            raise self._not_a_checkpoint(start)
        return tag, tensor

    def _read_tensor(self, start: int, stop: int) -> StoredTensor:
        dims: list[int] = []
        tensor_type, content = "", (stop, 0)
        for number, wire, first, last in self._fields(start, stop):
            if number == DIMS and wire in (VARINT, BYTES):
                # MindSpore writes them unpacked; protobuf readers have to accept both encodings.
                while first < last:
                    value, first = self._varint(first, last)
                    dims.append(value - (value >> 63 << 64))
                    if len(dims) > _MAX_DIMS:
                        raise self._not_a_checkpoint(start)
            elif number == TENSOR_TYPE and wire == BYTES:
                tensor_type = self._text(first, last)
            elif number == TENSOR_CONTENT and wire == BYTES:
                content = (first, last - first)
        return StoredTensor(tuple(dims), tensor_type, (content,))

    def _finish(self, tag: str, tensor: StoredTensor, slices: tuple[tuple[int, int], ...]) -> StoredTensor:
        """Return the tensor after checking its shape against its bytes."""
        stored = sum(length for _, length in slices)
        if tensor.tensor_type == STRING:
            return StoredTensor((), STRING, slices)
        dtype = ELEMENT_TYPES.get(tensor.tensor_type)
        if dtype is None:
            known = ", ".join(ELEMENT_TYPES)
            raise CheckpointError(f"{self._path}: {tag} has type {tensor.tensor_type!r}, but only {known} can be read")
        dims = () if tensor.dims == (0,) and stored else tensor.dims
        if any(size < 0 for size in dims) or prod(max(size, 1) for size in dims) * dtype.itemsize >= 1 << 63:
            raise CheckpointError(f"{self._path}: {tag} has the shape {list(dims)}, which no tensor has: copy or save it again")
        needed = prod(dims) * dtype.itemsize
        if stored != needed:
            raise CheckpointError(
                f"{self._path} holds {stored} bytes of {tag}, but {tensor.tensor_type} {list(dims)} has {needed}: copy or save it again"
            )
        return StoredTensor(dims, tensor.tensor_type, slices)

    def _fields(self, start: int, stop: int) -> Iterator[tuple[int, int, int, int]]:
        """Yield (field number, wire type, first byte, one past the last byte) of each field of a message."""
        while start < stop:
            field = self._field(start, stop)
            yield field
            start = field[3]

    def _field(self, at: int, stop: int) -> tuple[int, int, int, int]:
        key, first = self._varint(at, stop)
        number, wire = key >> 3, key & 7
        if number == 0:
            raise self._not_a_checkpoint(at)
        if wire == VARINT:
            last = self._varint(first, stop)[1]
        elif wire == BYTES:
            length, first = self._varint(first, stop)
            last = first + length
        elif wire in (FIXED32, FIXED64):
            last = first + (4 if wire == FIXED32 else 8)
        else:
            raise self._not_a_checkpoint(at)
        if last > stop:
            raise self._cut_off(last) if stop == self._end else self._not_a_checkpoint(at)
        return number, wire, first, last

    def _varint(self, at: int, stop: int) -> tuple[int, int]:
        """Return the varint that starts at `at`, and the position after it."""
        value = 0
        for shift in range(0, 70, 7):
            if at >= stop:
                raise self._cut_off(at + 1) if stop == self._end else self._not_a_checkpoint(at)
            byte = self._bytes(at, at + 1)[0]
            value |= (byte & 0x7F) << shift
            at += 1
            if byte < 0x80 and value < 1 << 64:
                return value, at
        raise self._not_a_checkpoint(at)

    def _text(self, start: int, stop: int) -> str:
        if stop - start > _MAX_TEXT_BYTES:
            raise self._not_a_checkpoint(start)
        try:
            return self._bytes(start, stop).decode("utf-8")
        except UnicodeDecodeError:
            raise self._not_a_checkpoint(start) from None

    def _bytes(self, start: int, stop: int) -> bytes:
        """Return a few bytes; the following ones are read ahead."""
        if start < self._window_start or stop > self._window_start + len(self._window):
            length = min(max(_WINDOW_BYTES, stop - start), self._end - start)
            self._window, self._window_start = self._read(start, length), start
        return self._window[start - self._window_start : stop - self._window_start]

    def _cut_off(self, needed: int) -> CheckpointError:
        return CheckpointError(f"{self._path} has {self._end} bytes, but what it holds reaches byte {needed}: copy it again")

    def _not_a_checkpoint(self, at: int) -> CheckpointError:
        return CheckpointError(
            f"{self._path} is no MindSpore checkpoint, or damaged: byte {at} of {self._end} begins nothing of its format"
        )
