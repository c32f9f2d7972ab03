"""Locate the tensors of a torch.save file by checking and reading the zip directory and the pickle, without reading tensors.

The globals in the pickle are verified against an allow list before it is loaded, and the result against the directory: no code is
executed, and no corrupt length causes a large allocation.
"""

from __future__ import annotations

import io
import pickletools
import re
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import ZIP_STORED, BadZipFile, ZipFile, ZipInfo, is_zipfile

from model.checkpoint.source import Checksum
from model.spec.file_kind import describe_file
from model.spec.tensor_info import TensorInfo
from parallel.errors import CheckpointError
from parallel.lazy_torch import torch
from parallel.regular_file import open_descriptor

_DTYPES = ("float16", "bfloat16", "float32")
_START, _DESCRIPTOR_START = b"PK\x03\x04", b"PK\x07\x08"
_LOCAL_HEADER_BYTES = 30
_MAX_DESCRIPTOR_BYTES = 24
_ENCRYPTED_FLAG, _DESCRIPTOR_FLAG = 1, 8
_MAX_BYTES = 4 << 20
"""Maximum size of the directory, and of each non-tensor record: the pickle of 1,100 tensors takes 250 KB."""
_NAMING_OPCODES = ("GLOBAL", "INST", "STACK_GLOBAL")
_TENSOR_GLOBALS = re.compile(r"collections OrderedDict|torch \w+Storage|torch\._utils _rebuild_(tensor_v2|parameter)")


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a file."""

    info: TensorInfo
    """Shape and dtype."""
    offset_bytes: int
    """Start offset in the file."""


def read_torch_header(path: Path, ignored_suffix: str) -> tuple[dict[str, StoredTensor], Checksum]:
    """Return the tensors of a dictionary written by torch.save, except names ending in `ignored_suffix`, and the file's checksum.

    Raises CheckpointError when it is corrupt, holds anything else, or would execute code.
    """
    try:
        with _BoundedFile(open_descriptor(path)) as file:
            records, checksum = _read_directory(path, file)
            file.seek(0)
            values = torch.load(file, map_location="meta", weights_only=True)
        if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
            raise CheckpointError(
                f"{path} holds a {type(values).__name__}, but a dictionary of tensors by name is needed: save one with torch.save"
            )
        kept = {name: value for name, value in values.items() if not name.endswith(ignored_suffix)}
        return {name: _find_tensor(path, name, value, records) for name, value in kept.items()}, checksum
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None
    # zipfile, pickletools and torch raise a dozen exception types for corrupt input.
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise CheckpointError(f"{path} cannot be read: {reason}. Copy it again") from None


class _BoundedFile(io.FileIO):
    """A file in which corrupt lengths cannot request more than _MAX_BYTES at once."""

    def read(self, size: int | None = -1, /) -> bytes:
        _check_length(size or 0)
        return super().read(size) or b""

    def readinto(self, buffer: Any, /) -> int | None:
        _check_length(memoryview(buffer).nbytes)
        return super().readinto(buffer)


def _check_length(size: int) -> None:
    if size > _MAX_BYTES:
        raise BadZipFile(f"{size} bytes are said to belong together, but {_MAX_BYTES} are the most that is no tensor")


def _read_directory(path: Path, file: _BoundedFile) -> tuple[dict[int, int], Checksum]:
    """Return the bytes of each record by start offset, after checking all records and the pickle; and their CRCs."""
    size = path.stat().st_size
    if file.read(len(_START)) != _START:
        if size and (words := describe_file(path)) and "pickle" not in words:
            raise CheckpointError(f"{path} {words}")
        raise CheckpointError(
            f"{path} of {size} bytes is no zip file, as torch.save has written since 1.6: save it again with a current torch"
        )
    if not is_zipfile(file):
        raise CheckpointError(f"{path} of {size} bytes was cut off, for a zip file ends with a directory: copy it again")
    with ZipFile(file) as archive:
        entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
        if not entries:
            raise CheckpointError(f"{path} holds no records: copy it again")
        folder = entries[0].filename.lower().split("/")[0] + "/"
        # torch ignores case when looking up records, and uses the folder of the first one.
        held = {entry.filename.lower().removeprefix(folder): entry for entry in entries if entry.filename.lower().startswith(folder)}
        if len(held) < len(entries):
            raise CheckpointError(f"{path} holds {len(entries)} records, but {len(held)} names in {folder}: save it with torch.save")
        ends = [*(entry.header_offset for entry in entries[1:]), archive.start_dir]
        records = {_find_record(path, file, entry, end): entry.file_size for entry, end in zip(entries, ends, strict=True)}
        for name, entry in held.items():
            if not name.startswith("data/"):
                _check_length(entry.file_size)
        if "data.pkl" not in held:
            raise CheckpointError(f"{path} holds no data.pkl, so torch.save did not write it: save it with torch.save")
        _check_pickle(path, archive.read(held["data.pkl"]))
        order = archive.read(held["byteorder"]) if "byteorder" in held else b"little"
    # torch would byte-swap storages that do not exist, and crash.
    if order != b"little":
        raise CheckpointError(f"{path} is of byte order {order!r}, but only b'little' is read: save it again on a little-endian machine")
    crcs = b"".join(entry.CRC.to_bytes(4, "little") for entry in entries)
    return records, Checksum("crc32", f"{zlib.crc32(crcs):08x}", "its zip directory", spans=tuple(records.items()))


def _find_record(path: Path, file: io.FileIO, entry: ZipInfo, end: int) -> int:
    """Return the start of the bytes of a record that ends before `end`."""
    if entry.compress_type != ZIP_STORED or entry.compress_size != entry.file_size or entry.flag_bits & _ENCRYPTED_FLAG:
        raise CheckpointError(
            f"{path}: {entry.filename} is compressed or encrypted, but rows are read from where they lie: save it with torch.save"
        )
    file.seek(entry.header_offset)
    header = file.read(_LOCAL_HEADER_BYTES)
    name_bytes, extra_bytes = struct.unpack_from("<HH", header, _LOCAL_HEADER_BYTES - 4)
    begin: int = entry.header_offset + _LOCAL_HEADER_BYTES + name_bytes + extra_bytes
    file.seek(begin + entry.file_size)
    between, mark = end - begin - entry.file_size, file.read(len(_DESCRIPTOR_START))
    has_descriptor = entry.file_size > 0 and entry.flag_bits & _DESCRIPTOR_FLAG
    is_whole = 0 < between <= _MAX_DESCRIPTOR_BYTES and mark == _DESCRIPTOR_START if has_descriptor else between == 0
    if not header.startswith(_START) or not is_whole:
        raise CheckpointError(
            f"{path}: {entry.filename} takes {entry.file_size} bytes from byte {begin}, but what follows begins at {end}: copy it again"
        )
    return begin


def _check_pickle(path: Path, data: bytes) -> None:
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name in _NAMING_OPCODES and not _TENSOR_GLOBALS.fullmatch(str(argument)):
            name = str(argument or opcode.name).replace(" ", ".")
            raise CheckpointError(f"{path} wants to run code ({name!r}), which no tensor needs; none was run: do not use this file")


def _find_tensor(path: Path, name: str, value: object, records: dict[int, int]) -> StoredTensor:
    if not isinstance(value, torch.Tensor):
        raise CheckpointError(f"{path}: {name!r} is a {type(value).__name__}, but only tensors are read: save the weights alone")
    dtype = str(value.dtype).removeprefix("torch.")
    if dtype not in _DTYPES:
        raise CheckpointError(f"{path}: {name!r} is {dtype}, but only {', '.join(_DTYPES)} are read: convert it first")
    info = TensorInfo.of(value)
    if not value.is_contiguous():
        raise CheckpointError(f"{path}: {name!r} has strides {value.stride()}, but only row after row is read: save it made contiguous")
    record, skipped = value.untyped_storage()._checkpoint_offset, int(value.storage_offset()) * value.dtype.itemsize
    if record not in records:
        raise CheckpointError(f"{path}: {name!r} is said to lie at byte {record}, where no record begins: save it again with torch.save")
    end = skipped + info.num_bytes
    if end > records[record]:
        raise CheckpointError(f"{path}: {name!r} reaches byte {end} of its record, which has {records[record]} bytes: copy it again")
    return StoredTensor(info, record + skipped)
