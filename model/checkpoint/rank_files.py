"""Rank files: one safetensors file per rank and layout.json, written by `tandem reshard` and readable by any number of ranks.

layout.json holds the format version, the world size, the quantization scheme, the rows of every tensor in each rank's file, the sha256
of every file, and a fingerprint that is quick to check. KV heads shared by several ranks are stored in each of their files.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from model.checkpoint.hf_folder import SINGLE_FILE
from model.checkpoint.safetensors_file import read_header
from model.checkpoint.source import Checksum
from model.spec.config import read_config
from model.spec.tensor_info import TensorInfo
from parallel.errors import CheckpointError
from parallel.file_slices import FileReader, StoredRows
from parallel.lazy_torch import torch
from parallel.regular_file import MAX_INDEX_BYTES, open_regular, read_text

LAYOUT_FILE = "layout.json"
FORMAT_VERSION = 2
_MAX_WORLD_SIZE = 4096
_AGAIN = "write the rank files again with tandem reshard"
_SAMPLES, _SAMPLE_BYTES = 16, 4096
"""Number and size of the samples in a file's fingerprint."""


def rank_file_name(rank: int, world_size: int) -> str:
    """Return rank_00_of_08.safetensors; for one rank model.safetensors, so that the folder is a regular Hugging Face folder."""
    if world_size == 1:
        return SINGLE_FILE
    return f"rank_{rank:02d}_of_{world_size:02d}.safetensors"


class RankFiles:
    """A folder of rank files. Rows are read from whichever files hold them.

    Raises CheckpointError when a file is missing, truncated, of another rank or another checkpoint, or when the files do not hold all
    rows listed in layout.json.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = read_config(path / "config.json")
        self.layout = _read_layout(path)
        self.world_size: int = self.layout["world_size"]
        self.files = [path / name for name in self.layout["files"]]
        self.checksums = {path / name: Checksum("sha256", value, LAYOUT_FILE) for name, value in self.layout["files"].items()}
        headers = [read_header(file) for file in self.files]
        self._parts: dict[str, list[StoredRows]] = {}
        self.tensors: dict[str, TensorInfo] = {}
        for name, entry in self.layout["tensors"].items():
            parts, shape = [], tuple(entry["shape"])
            for file, header, (start, stop) in zip(self.files, headers, entry["rows"], strict=True):
                stored = header.pop(name, None)
                wanted = (stop - start, *shape[1:])
                if stored is None or stored.info.shape != wanted:
                    found = "no such tensor" if stored is None else f"shape {list(stored.info.shape)}"
                    raise CheckpointError(f"{file} holds {found} under {name}, but {LAYOUT_FILE} says {list(wanted)}")
                parts.append(stored.stored_rows(file, start))
            dtypes = {part.dtype for part in parts}
            if len(dtypes) > 1:
                found = " and ".join(sorted(dtype.label for dtype in dtypes))
                raise CheckpointError(f"{path}: {name} is stored as {found} in different rank files; write them again with tandem reshard")
            self._parts[name] = parts
            self.tensors[name] = TensorInfo(shape, dtypes.pop())
        for file, header in zip(self.files, headers, strict=True):
            if header:
                raise CheckpointError(f"{file} holds {len(header)} tensors that {LAYOUT_FILE} does not know, {next(iter(header))} first")
        self._check_fingerprints()

    def read_rows(self, reader: FileReader, name: str, start: int, stop: int) -> torch.Tensor:
        """Return rows [start, stop) of a tensor."""
        return reader.read_rows(self.locate_rows(name, start, stop), start, stop)

    def locate_rows(self, name: str, start: int, stop: int) -> list[StoredRows]:
        """Return where the rows are stored, preferring a single file that holds all of them."""
        parts = self._parts[name]
        whole = [part for part in parts if part.start <= start and stop <= part.stop]
        return whole[:1] or parts

    def tokenizer_path(self) -> Path:
        """Return the folder itself."""
        return self.path

    def _check_fingerprints(self) -> None:
        """Detect swapped files, and files of another model with the same shapes, from a few samples."""
        for file, expected in zip(self.files, self.layout["fingerprints"].values(), strict=True):
            if read_sample(file) != expected:
                raise CheckpointError(
                    f"{file} is not the file that {LAYOUT_FILE} was written for: it is damaged, swapped with another rank's, "
                    "or of another checkpoint; copy the folder again"
                )


def read_sample(file: Path) -> str:
    """Hash a file's size and a few samples spread over it, including the first and the last bytes."""
    size = file.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with open_regular(file) as opened:
        for number in range(_SAMPLES):
            opened.seek(max(0, size - _SAMPLE_BYTES) * number // (_SAMPLES - 1))
            digest.update(opened.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def _read_layout(path: Path) -> dict[str, Any]:
    file = path / LAYOUT_FILE
    try:
        layout = json.loads(read_text(file, MAX_INDEX_BYTES))
        version = layout["format_version"]
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise CheckpointError(f"{file} cannot be read; {_AGAIN}") from None
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{file} has format version {version}, but this tandem reads {FORMAT_VERSION}; {_AGAIN}")
    try:
        _check_layout(layout)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{file} does not fit together ({error}); {_AGAIN}") from None
    assert isinstance(layout, dict)
    return layout


def _check_layout(layout: Any) -> None:
    """Raise ValueError, or the error of a value of the wrong type, unless the files match the world size and hold all rows."""
    world_size = layout["world_size"]
    if type(world_size) is not int or not 1 <= world_size <= _MAX_WORLD_SIZE:
        raise ValueError(f"{world_size!r} ranks, but 1 to {_MAX_WORLD_SIZE} are possible")
    names = [rank_file_name(rank, world_size) for rank in range(world_size)]
    for key in ("files", "fingerprints"):
        if list(layout[key]) != names or not all(type(value) is str for value in layout[key].values()):
            raise ValueError(f"{key} names {len(layout[key])} files, but {world_size} ranks have {names[0]} to {names[-1]}")
    for name, entry in layout["tensors"].items():
        sizes, rows, end = entry["shape"], entry["rows"], 0
        if not sizes or any(type(size) is not int or size < 0 for size in (*sizes, *(row for part in rows for row in part))):
            raise ValueError(f"{name} has shape {sizes} and rows {rows[:3]}")
        if len(rows) != world_size:
            raise ValueError(f"{name} has rows of {len(rows)} ranks, but there are {world_size}")
        for start, stop in rows:
            if start > end or stop < start:
                raise ValueError(f"rows {end} to {start} of {name} are in no file")
            end = max(end, stop)
        if end != sizes[0]:
            raise ValueError(f"{name} has {sizes[0]} rows, but its parts end at {end}")
