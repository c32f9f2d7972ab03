"""The header of a GGUF file: metadata and tensor locations.

Parses versions 2 and 3. No count or length is trusted before checking that the file is large enough for it.
"""

import mmap
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.spec.quoting import is_plain, quote
from parallel.errors import CheckpointError
from parallel.regular_file import open_regular

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""gguf_metadata_value_type to struct format characters; 8 is a string and 9 an array."""
_LAYOUTS = {kind: struct.Struct("<" + letter) for kind, letter in _SCALARS.items()}
_STRING, _ARRAY = 8, 9
_UINT32, _UINT64 = 4, 10
_DEFAULT_ALIGNMENT, _MAX_ALIGNMENT = 32, 1 << 20
_MAX_HEADER_BYTES = 1 << 26
_MAX_ENTRIES = 1 << 17
"""Maximum number of tensors, and of keys."""
_MAX_VALUES = 1 << 21
"""Maximum number of array elements in total: 1.5 times the largest vocabularies, and under 200 MB as Python values."""
_MAX_DEPTH, _MAX_DIMENSIONS = 4, 4


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor as described in the header."""

    shape: tuple[int, ...]
    """Rows first (GGUF itself stores the innermost dimension first)."""
    type_number: int
    """ggml_type number."""
    offset_bytes: int
    """Start offset in the file."""


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """Everything in a GGUF file before the tensor data."""

    metadata: dict[str, Any]
    """Key-value pairs; arrays are lists."""
    tensors: dict[str, StoredTensor]
    """By llama.cpp's names, in file order."""
    alignment: int
    """Tensor offsets are multiples of it, relative to `start_bytes`."""
    start_bytes: int
    """Start offset of the first tensor."""


def read_gguf_header(path: Path) -> GgufHeader:
    """Read the header of a GGUF file. Raises CheckpointError when it is not GGUF, or is of another version, truncated or inconsistent.

    gguf.GGUFReader keeps an array view per string: seconds for a vocabulary of 50,000, on every rank. This takes a tenth of a second.
    """
    try:
        with open_regular(path) as file:
            if not os.fstat(file.fileno()).st_size:
                raise CheckpointError(f"{path} is not a whole GGUF file: it has 0 bytes: copy it again")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _HeaderCursor(data, path).read_header()
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None


class _HeaderCursor:
    """Cursor over a header; little-endian, as all files except those of big-endian machines."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self._data, self._path, self._at = data, path, 0
        self._end, self._values_left = min(len(data), _MAX_HEADER_BYTES), _MAX_VALUES

    def read_header(self) -> GgufHeader:
        magic = self._data[:4]
        if not b"GGUF".startswith(magic):
            raise CheckpointError(f"{self._path} is not a GGUF file: it begins with {magic!r} instead of b'GGUF'")
        self._take(4, "its magic number")
        version = self._scalar(_UINT32)
        if version not in (2, 3):
            raise CheckpointError(f"{self._path} has GGUF version {version}, but only 2 and 3 (little-endian) can be read: convert again")
        num_tensors, num_keys = self._count("tensors"), self._count("keys")
        metadata: dict[str, Any] = {}
        for _ in range(num_keys):
            key = self._name("key", metadata)
            metadata[key] = self._value(self._scalar(_UINT32), key)
        alignment = self._read_alignment(metadata)
        tensors: dict[str, StoredTensor] = {}
        for _ in range(num_tensors):
            name = self._name("tensor", tensors)
            tensors[name] = self._tensor(name, alignment)
        start = -(-self._at // alignment) * alignment
        placed = {name: StoredTensor(one.shape, one.type_number, start + one.offset_bytes) for name, one in tensors.items()}
        return GgufHeader(metadata, placed, alignment, start)

    def _take(self, num_bytes: int, what: str) -> int:
        """Advance by `num_bytes`; return the previous position."""
        start, stop = self._at, self._at + num_bytes
        if stop > self._end:
            size = len(self._data)
            whole = f"its {size} bytes" if self._end == size else f"the {self._end} bytes that a header may have"
            raise CheckpointError(
                f"{self._path} is not a whole GGUF file: {what} at byte {start} needs {num_bytes} bytes, more than the rest of {whole}: "
                "copy it again"
            )
        self._at = stop
        return start

    def _scalar(self, kind: int) -> Any:
        layout = _LAYOUTS[kind]
        return layout.unpack_from(self._data, self._take(layout.size, "a number"))[0]

    def _string(self) -> str:
        length = self._scalar(_UINT64)
        start = self._take(length, "a text")
        return self._data[start : start + length].decode("utf-8", errors="replace")

    def _count(self, what: str) -> int:
        count = self._scalar(_UINT64)
        if count > _MAX_ENTRIES:
            raise CheckpointError(f"{self._path} claims to have {count} {what}, but at most {_MAX_ENTRIES} can be read: copy it again")
        return int(count)

    def _name(self, what: str, known: dict[str, Any]) -> str:
        name = self._string()
        if not name or not is_plain(name):
            raise CheckpointError(f"{self._path}: its header names a {what} {quote(name)}, which cannot be a name: copy it again")
        if name in known:
            raise CheckpointError(f"{self._path} holds the {what} {name} twice: copy it again or convert it again")
        return name

    def _value(self, kind: int, key: str, depth: int = 0) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            return self._array(key, depth + 1)
        if kind not in _SCALARS:
            raise CheckpointError(f"{self._path}: {key} is of type {kind}, but GGUF has the types 0 to 12: copy it again")
        return self._scalar(kind)

    def _array(self, key: str, depth: int) -> list[Any]:
        kind, length = self._scalar(_UINT32), self._scalar(_UINT64)
        if depth > _MAX_DEPTH or length > self._values_left:
            found = f"arrays in arrays, {depth} deep" if depth > _MAX_DEPTH else f"an array of {length} elements"
            raise CheckpointError(
                f"{self._path}: {key} holds {found}, but at most {_MAX_DEPTH} deep and {_MAX_VALUES} in all can be read: copy it again"
            )
        self._values_left -= length
        if kind not in _SCALARS:
            return [self._value(kind, key, depth) for _ in range(length)]
        layout = struct.Struct(f"<{length}{_SCALARS[kind]}")
        return list(layout.unpack_from(self._data, self._take(layout.size, f"the array {key}")))

    def _read_alignment(self, metadata: dict[str, Any]) -> int:
        found = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if type(found) is not int or not 0 < found <= _MAX_ALIGNMENT or found & (found - 1):
            raise CheckpointError(
                f"{self._path}: general.alignment is {quote(found)}, but a power of two up to {_MAX_ALIGNMENT} is needed: convert it again"
            )
        return found

    def _tensor(self, name: str, alignment: int) -> StoredTensor:
        """Read a tensor entry; its offset is relative to the end of the header."""
        dimensions = self._scalar(_UINT32)
        if not 0 < dimensions <= _MAX_DIMENSIONS:
            raise CheckpointError(f"{self._path}: {name} has {dimensions} dimensions, but 1 to {_MAX_DIMENSIONS} can be: copy it again")
        shape = tuple(self._scalar(_UINT64) for _ in range(dimensions))[::-1]
        kind, offset = self._scalar(_UINT32), self._scalar(_UINT64)
        if 0 in shape:
            raise CheckpointError(f"{self._path}: {name} has shape {list(shape)}, but sizes of at least 1 are needed: copy it again")
        if offset % alignment:
            raise CheckpointError(f"{self._path}: {name} begins at byte {offset}, which is no multiple of {alignment}: copy it again")
        return StoredTensor(shape, kind, offset)
