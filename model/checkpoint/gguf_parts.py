"""The file or files of a GGUF checkpoint: their headers, and where every tensor lies.

llama.cpp splits a large model into NAME-00001-of-0000N.gguf; the first part holds the metadata, and each part its own tensors.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.checkpoint.gguf_header import GgufHeader, StoredTensor, read_gguf_header
from model.checkpoint.gguf_types import check_encoding
from model.spec.quoting import quote
from parallel.errors import CheckpointError

_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_NUMBER_KEY, _COUNT_KEY, _TENSORS_KEY = "split.no", "split.count", "split.tensors.count"
_MAX_PARTS = 10_000


@dataclass(frozen=True, slots=True)
class GgufParts:
    """All files of one checkpoint, with their headers read and compared."""

    headers: Mapping[Path, GgufHeader]
    """By file, in order; the first holds the metadata."""
    tensors: dict[str, tuple[Path, StoredTensor]]
    """File and location, by llama.cpp's names."""

    @property
    def files(self) -> tuple[Path, ...]:
        """The files, in order."""
        return tuple(self.headers)

    @property
    def metadata(self) -> dict[str, Any]:
        """Key-value pairs of the first file."""
        return next(iter(self.headers.values())).metadata

    def check_tensors(self) -> None:
        """Raise CheckpointError unless all types are supported and tensors are contiguous except for alignment padding."""
        for path, header in self.headers.items():
            _check_tensors(path, header)


def read_parts(path: Path) -> GgufParts:
    """Read the header of a GGUF file, and of the other parts if it is one of several.

    Raises CheckpointError for missing parts, parts of another checkpoint, and truncated headers.
    """
    header = read_gguf_header(path)
    count = _read_count(header, path)
    files = (path,) if count == 1 else _name_parts(path, count)
    headers = [header if file == path else read_gguf_header(file) for file in files]
    tensors: dict[str, tuple[Path, StoredTensor]] = {}
    for number, (file, one) in enumerate(zip(files, headers, strict=True)):
        if count > 1:
            _check_part(file, one, number, count)
        for name, tensor in one.tensors.items():
            if name in tensors:
                raise CheckpointError(f"{name} is in both {tensors[name][0]} and {file}: copy all parts of one checkpoint")
            tensors[name] = (file, tensor)
    total = headers[0].metadata.get(_TENSORS_KEY)
    if count > 1 and total != len(tensors):
        raise CheckpointError(
            f"{files[0]}: {_TENSORS_KEY} is {quote(total)}, but its {count} parts hold {len(tensors)}: copy all parts of one checkpoint"
        )
    return GgufParts(dict(zip(files, headers, strict=True)), tensors)


def find_whole(files: Sequence[Path]) -> Path | None:
    """Return the path that stands for these GGUF files of one folder: the only file, or the first part of one split file; else None."""
    if len(files) < 2:
        return next(iter(files), None)
    parts = [_PART.fullmatch(file.name) for file in files]
    names = {(part["stem"], part["count"]) for part in parts if part}
    return min(files) if all(parts) and len(names) == 1 else None


def _read_count(header: GgufHeader, path: Path) -> int:
    count = header.metadata.get(_COUNT_KEY, 1)
    if type(count) is not int or not 0 <= count <= _MAX_PARTS:
        raise CheckpointError(f"{path}: {_COUNT_KEY} is {quote(count)}, but a whole number from 0 to {_MAX_PARTS} is needed: copy it again")
    return max(1, count)


def _name_parts(path: Path, count: int) -> tuple[Path, ...]:
    part = _PART.fullmatch(path.name)
    if part is None or int(part["count"]) != count:
        raise CheckpointError(
            f"{path} is one of {count} parts, which are found by their names: name it as llama.cpp did, NAME-00001-of-{count:05}.gguf, "
            "next to the others"
        )
    files = tuple(path.with_name(f"{part['stem']}-{number:05}-of-{count:05}.gguf") for number in range(1, count + 1))
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        more = f", and {len(missing) - 10} more" if len(missing) > 10 else ""
        raise CheckpointError(f"{path.parent} lacks {len(missing)} of the {count} parts: {', '.join(missing[:10])}{more}; copy them")
    return files


def _check_part(file: Path, header: GgufHeader, number: int, count: int) -> None:
    for key, expected in ((_NUMBER_KEY, number), (_COUNT_KEY, count)):
        found = header.metadata.get(key)
        if type(found) is not int or found != expected:
            raise CheckpointError(f"{file}: {key} is {quote(found)}, but its name needs {expected}: copy all parts of one checkpoint")


def _check_tensors(path: Path, header: GgufHeader) -> None:
    encodings = {name: check_encoding(tensor, name, path) for name, tensor in header.tensors.items()}
    size, last, end = path.stat().st_size, 0, header.start_bytes
    for name, tensor in sorted(header.tensors.items(), key=lambda item: item[1].offset_bytes):
        last = tensor.offset_bytes + encodings[name].count_bytes(tensor)
        if last > size:
            raise CheckpointError(f"{path} has {size} bytes, but {name} reaches byte {last}: copy it again")
        if tensor.offset_bytes != end:
            raise CheckpointError(f"{path}: {name} begins at byte {tensor.offset_bytes} instead of {end}: copy it again")
        end = -(-last // header.alignment) * header.alignment
    if size > end:
        raise CheckpointError(f"{path} has {size} bytes, but its tensors end at byte {last}: copy it again")
