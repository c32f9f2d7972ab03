"""The header of a GGUF file: its metadata, and where each tensor lies.

Knows the bytes of GGUF 2 and 3; no architectures, no names, no element types.
"""

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parallel.errors import CheckpointError

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""gguf_metadata_value_type to struct letters; 8 is a string and 9 an array."""
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor as the header describes it."""

    shape: tuple[int, ...]
    """Rows first (GGUF itself writes the innermost dimension first)."""
    type_number: int
    """Number of its ggml_type."""
    offset_bytes: int
    """Where it begins in the file."""


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """All that a GGUF file says before its tensors."""

    metadata: dict[str, Any]
    """Key-value pairs; arrays are lists."""
    tensors: dict[str, StoredTensor]
    """By llama.cpp's names, in file order."""


def read_gguf_header(path: Path) -> GgufHeader:
    """The header of a GGUF file. Raises CheckpointError when it is none, of another version, or cut off.

    gguf.GGUFReader keeps an array view per string: seconds for a vocabulary of 50,000, in every rank. This takes a tenth of one.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _HeaderCursor(data, path).read_header()
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except CheckpointError:
        raise
    except (struct.error, ValueError):  # ValueError: an empty file cannot be mapped
        raise CheckpointError(f"{path} is not a whole GGUF file ({path.stat().st_size} bytes end in its header): copy it again") from None


class _HeaderCursor:
    """Walks over a header, little-endian as all files but those of big-endian machines."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self._data, self._path, self._at = data, path, 0

    def read_header(self) -> GgufHeader:
        magic, version = self._data[:4], self._scalar("I", skip=4)
        if magic != b"GGUF":
            raise CheckpointError(f"{self._path} is not a GGUF file: it begins with {magic!r} instead of b'GGUF'")
        if version not in (2, 3):
            raise CheckpointError(f"{self._path} has GGUF version {version}, but only 2 and 3 (little-endian) can be read: convert again")
        num_tensors, num_pairs = self._scalar("Q"), self._scalar("Q")
        metadata = {self._string(): self._value(self._scalar("I")) for _ in range(num_pairs)}
        infos = [self._tensor_info() for _ in range(num_tensors)]
        alignment = metadata.get("general.alignment") or 32
        base = -(-self._at // alignment) * alignment
        return GgufHeader(metadata, {name: StoredTensor(shape, number, base + offset) for name, shape, number, offset in infos})

    def _scalar(self, letter: str, skip: int = 0) -> Any:
        layout = struct.Struct("<" + letter)
        (value,) = layout.unpack_from(self._data, self._at + skip)
        self._at += skip + layout.size
        return value

    def _string(self) -> str:
        start = self._at + 8
        stop = start + self._scalar("Q")
        if stop > len(self._data):
            raise struct.error("string beyond the end")
        self._at = stop
        return self._data[start:stop].decode("utf-8", errors="replace")

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            kind, length = self._scalar("I"), self._scalar("Q")
            if kind not in _SCALARS:
                return [self._value(kind) for _ in range(length)]
            layout = struct.Struct(f"<{length}{_SCALARS[kind]}")
            values = list(layout.unpack_from(self._data, self._at))
            self._at += layout.size
            return values
        if kind not in _SCALARS:
            raise CheckpointError(f"{self._path} has metadata of type {kind}, but GGUF has the types 0 to 12: copy it again")
        return self._scalar(_SCALARS[kind])

    def _tensor_info(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string()
        shape = tuple(self._scalar("Q") for _ in range(self._scalar("I")))[::-1]
        return name, shape, self._scalar("I"), self._scalar("Q")
