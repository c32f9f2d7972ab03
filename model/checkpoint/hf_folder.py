"""A Hugging Face folder: config.json beside one safetensors file, or several with an index.

Knows the folder's files; not what its tensors are for.
"""

import json
import re
from pathlib import Path

import torch

from model.checkpoint.checksum_file import read_sha256sums
from model.checkpoint.safetensors_file import StoredTensor, read_header
from model.spec.config import read_config
from model.spec.quoting import quote, quote_name
from parallel.errors import CheckpointError
from parallel.file_slices import FileReader, StoredRows

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_FILE_NAME = re.compile(r"[^/\\\0]+\.safetensors")


class HuggingFaceFolder:
    """Opened by its headers. Raises CheckpointError for files that are missing or short, ConfigError for config.json."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = read_config(path / "config.json")
        self._stored: dict[str, tuple[Path, StoredTensor]] = {}
        self._add_files(_weight_files(path))
        if not (path / SINGLE_FILE).is_file():
            _check_index(path, {name: file.name for name, (file, _) in self._stored.items()})

    def _add_files(self, files: list[Path]) -> None:
        self.files, self.checksums = files, read_sha256sums(self.path, files)
        for file in files:
            for name, stored in read_header(file).items():
                if name in self._stored:
                    raise CheckpointError(f"{name} is in both {self._stored[name][0]} and {file}: copy the checkpoint again")
                self._stored[name] = (file, stored)
        self.tensors = {name: stored.info for name, (_, stored) in self._stored.items()}

    def read_rows(self, reader: FileReader, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of a tensor."""
        return reader.read_rows(self.locate_rows(name, start, stop), start, stop)

    def locate_rows(self, name: str, start: int, stop: int) -> list[StoredRows]:
        """Where they lie."""
        file, stored = self._stored[name]
        return [stored.stored_rows(file)]

    def tokenizer_path(self) -> Path:
        """The folder itself."""
        return self.path


def _weight_files(path: Path) -> list[Path]:
    if (path / SINGLE_FILE).is_file():
        files = [path / SINGLE_FILE]
    elif (path / INDEX_FILE).is_file():
        files = [path / name for name in sorted(set(_read_weight_map(path).values()))]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            more = f", and {len(missing) - 10} more" if len(missing) > 10 else ""
            raise CheckpointError(f"{path} lacks {len(missing)} of its {len(files)} files: {', '.join(missing[:10])}{more}; copy them")
    else:
        raise CheckpointError(f"{path} holds neither {SINGLE_FILE} nor {INDEX_FILE}")
    for file in files:
        check_link(file)
    return files


def check_link(file: Path) -> None:
    """A link may lead within the folder, or from a snapshot of the Hugging Face hub's cache into the same model's blobs."""
    folder, target = file.parent.resolve(), file.resolve()
    blobs = folder.parent.parent / "blobs" if folder.parent.name == "snapshots" else folder
    if not target.is_relative_to(folder) and not target.is_relative_to(blobs):
        raise CheckpointError(f"{file} is a link out of its folder, to {target}: copy the file itself here")


def _read_weight_map(path: Path) -> dict[str, str]:
    try:
        weight_map = json.loads((path / INDEX_FILE).read_text(encoding="utf-8"))["weight_map"]
        files = {str(name): str(file) for name, file in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(f"{path / INDEX_FILE} has no readable weight_map") from None
    outside = next((file for file in files.values() if not _FILE_NAME.fullmatch(file)), None)
    if outside is not None:
        raise CheckpointError(f"{path / INDEX_FILE} names {quote(outside)}, which is no safetensors file of its folder")
    return files


def _check_index(path: Path, found: dict[str, str]) -> None:
    listed = _read_weight_map(path)
    wrong = [name for name, file in listed.items() if found.get(name) != file]
    if wrong:
        raise CheckpointError(
            f"{path / INDEX_FILE} lists {len(wrong)} of {len(listed)} tensors that are not in the files it names, "
            f"{quote_name(wrong[0])} in {listed[wrong[0]]} first: copy the checkpoint again"
        )
