"""Read and write safetensors files: headers are checked against the file size, rows located, new files written as a stream.

The safetensors library maps files and writes only tensors that are entirely in memory. A rank needs single rows, counted, and a 70B
checkpoint is rewritten tensor by tensor.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import struct
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from model.spec.file_kind import describe_file
from model.spec.quoting import is_plain, quote, quote_name
from model.spec.tensor_info import TensorInfo
from parallel.element_type import ElementType
from parallel.errors import CheckpointError
from parallel.file_slices import StoredRows
from parallel.lazy_torch import torch
from parallel.regular_file import open_regular

_DTYPES = {
    "F64": ElementType.FLOAT64,
    "F32": ElementType.FLOAT32,
    "F16": ElementType.FLOAT16,
    "BF16": ElementType.BFLOAT16,
    "I64": ElementType.INT64,
    "I32": ElementType.INT32,
    "I16": ElementType.INT16,
    "I8": ElementType.INT8,
    "U8": ElementType.UINT8,
    "BOOL": ElementType.BOOL,
    "F8_E4M3": ElementType.FLOAT8_E4M3FN,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_OTHER_DTYPES = {
    "F8_E5M2": "FP8",
    "F8_E8M0": "a scale of MXFP4 or MXFP8",
    "F8_E4M3FNUZ": "FP8",
    "F8_E5M2FNUZ": "FP8",
    "F6_E2M3": "FP6",
    "F6_E3M2": "FP6",
    "F4": "FP4",
    "C64": "complex",
    "U16": "unsigned",
    "U32": "unsigned",
    "U64": "unsigned",
}
"""Types of the format that no supported checkpoint uses."""
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_MAX_DIMENSIONS, _MAX_NUMBER = 64, (1 << 63) - 1


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a file."""

    info: TensorInfo
    """Shape and dtype."""
    offset_bytes: int
    """Start offset in the file."""

    def stored_rows(self, path: Path, first_row: int = 0) -> StoredRows:
        """Return its rows, numbered from `first_row`."""
        shape = self.info.shape or (1,)
        return StoredRows(path, self.offset_bytes, first_row, first_row + shape[0], shape[1:], self.info.dtype)


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a safetensors file by name.

    Raises CheckpointError when the file is missing, is not safetensors, does not have the size given by its header, or has an
    inconsistent header.
    """
    try:
        with io.BufferedReader(open_regular(path)) as file:
            size = os.fstat(file.fileno()).st_size
            (length,) = struct.unpack("<Q", file.read(8).ljust(8, b"\xff"))
            if length > min(_MAX_HEADER_BYTES, size - 8):
                if size and (words := describe_file(path)):
                    raise CheckpointError(f"{path} {words}")
                raise CheckpointError(
                    f"{path} is no whole safetensors file: it has {size} bytes, its header alone needs {length + 8}, "
                    f"and {_MAX_HEADER_BYTES} are the most that one may have: copy it again"
                )
            text = file.read(length).decode()
        header = json.loads(text, object_pairs_hook=_read_once)
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} cannot be read as safetensors: {error}: copy it again") from None
    if not isinstance(header, dict) or text[0] != "{":
        raise CheckpointError(f"{path} cannot be read as safetensors: its header begins with {text[:1]!r} instead of '{{': copy it again")
    tensors, start = {}, 8 + length
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        info, begin, end = _read_entry(path, name, entry)
        if start + end > size:
            raise CheckpointError(f"{path} is truncated: it has {size} bytes, {name} ends at byte {start + end}; copy it again")
        tensors[name] = StoredTensor(info, start + begin)
    _check_places(path, tensors, start, size)
    return tensors


def _read_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        seen: set[str] = set()
        double = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"its header holds {quote_name(double)} twice")
    return entries


def _read_entry(path: Path, name: str, entry: Any) -> tuple[TensorInfo, int, int]:
    """Return shape, dtype, and bytes [begin, end) after the header."""
    if not is_plain(name):
        raise CheckpointError(f"{path}: its header names a tensor {quote(name)}, which cannot be a name: copy it again")
    try:
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not (type(shape) is type(offsets) is list and len(shape) <= _MAX_DIMENSIONS and len(offsets) == 2):
            raise ValueError
        if any(type(number) is not int or not 0 <= number <= _MAX_NUMBER for number in (*shape, *offsets)):
            raise ValueError
        info, (begin, end) = TensorInfo(tuple(shape), _DTYPES[dtype]), offsets
    except (KeyError, TypeError, ValueError):
        kind = entry.get("dtype") if isinstance(entry, dict) else None
        if isinstance(kind, str) and kind in _OTHER_DTYPES:
            raise CheckpointError(
                f"{path}: {name} has type {kind} ({_OTHER_DTYPES[kind]}), which is not supported; types are {', '.join(_DTYPES)}"
            ) from None
        known = "" if not isinstance(entry, dict) or kind in _NAMES.values() else f"; types are {', '.join(_DTYPES)}"
        raise CheckpointError(f"{path}: the header entry of {name} cannot be read: {quote(entry)}{known}") from None
    if end - begin != info.num_bytes:
        raise CheckpointError(
            f"{path}: {name} has {end - begin} bytes, but its shape {quote(shape)} in {dtype} needs {info.num_bytes}: copy it again"
        )
    return info, begin, end


def _check_places(path: Path, tensors: Mapping[str, StoredTensor], start: int, size: int) -> None:
    """Check that the tensors are contiguous and cover the whole file."""
    end = start
    for name, stored in sorted(tensors.items(), key=lambda item: (item[1].offset_bytes, item[1].info.num_bytes)):
        if stored.offset_bytes != end:
            raise CheckpointError(f"{path}: {name} begins at byte {stored.offset_bytes}, but the one before ends at {end}: copy it again")
        end += stored.info.num_bytes
    if end != size:
        raise CheckpointError(f"{path} has {size} bytes, but its tensors end at byte {end}: copy it again")


class SafetensorsWriter:
    """Writes a file in the tensor order of `tensors`; an atomic write, so it appears only when complete.

    A second thread hashes the data while the caller continues.
    """

    def __init__(self, path: Path, tensors: Mapping[str, TensorInfo]) -> None:
        self._path, self._temporary = path, path.with_name(f".{path.name}.partial-{os.getpid()}")
        self._left = {name: info.num_bytes for name, info in tensors.items()}
        self._infos = tensors
        self._hash, self._hasher = hashlib.sha256(), ThreadPoolExecutor(1)
        self._hashing: Future[None] | None = None
        header, offset = {"__metadata__": {"format": "pt"}}, 0
        entries: dict[str, object] = dict(header)
        for name, info in tensors.items():
            entries[name] = {"dtype": _NAMES[info.dtype], "shape": list(info.shape), "data_offsets": [offset, offset + info.num_bytes]}
            offset += info.num_bytes
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._file = self._temporary.open("wb", buffering=0)
        self._put(memoryview(struct.pack("<Q", len(text)) + text))

    def write(self, name: str, rows: torch.Tensor) -> None:
        """Append the next tensor, whole or in runs of rows. `rows` must not be modified afterwards."""
        expected = next(iter(self._left))
        assert name == expected, (name, expected)
        info = self._infos[name]
        assert (tuple(rows.shape[1:]), rows.dtype) == (info.shape[1:], info.dtype.torch_dtype), (name, rows.shape, rows.dtype, info)
        self._left[name] -= rows.nbytes
        assert self._left[name] >= 0, (name, rows.shape, info)
        if self._left[name] == 0:
            del self._left[name]
        self._put(memoryview(rows.contiguous().reshape(-1).view(torch.uint8).numpy().data))

    @property
    def sha256(self) -> str:
        """Return the hash of the file."""
        self._finish_hash()
        return self._hash.hexdigest()

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._finish_hash()
        self._hasher.shutdown()
        if kind is None and not self._left:
            os.fsync(self._file.fileno())
            self._file.close()
            self._temporary.rename(self._path)
        else:
            self._file.close()
            self._temporary.unlink()
            assert kind is not None, f"not written: {list(self._left)}"

    def _put(self, data: memoryview) -> None:
        self._finish_hash()
        self._hashing = self._hasher.submit(self._hash.update, data)
        done = 0
        while done < len(data):
            done += self._file.write(data[done:])

    def _finish_hash(self) -> None:
        if self._hashing is not None:
            self._hashing.result()
            self._hashing = None
