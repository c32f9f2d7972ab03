"""A Hugging Face folder: config.json beside one safetensors file, or several with an index.

Knows the folder's files; not what its tensors are for.
"""

import json
from pathlib import Path

import torch

from model.checkpoint.safetensors_file import StoredTensor, read_header
from model.checkpoint.source import TensorInfo
from model.config import read_config
from parallel.errors import CheckpointError
from parallel.file_slices import FileReader

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


class HuggingFaceFolder:
    """Opened by its headers. Raises CheckpointError for files that are missing or short, ConfigError for config.json."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = read_config(path / "config.json")
        self._stored: dict[str, tuple[Path, StoredTensor]] = {}
        for file in _weight_files(path):
            self._stored.update({name: (file, stored) for name, stored in read_header(file).items()})
        self.tensors = {name: stored.info for name, (_, stored) in self._stored.items()}
        _check_index(path, self.tensors)

    def read_rows(self, reader: FileReader, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of a tensor."""
        file, stored = self._stored[name]
        return reader.read_rows([stored.stored_rows(file)], start, stop)

    def tokenizer_path(self) -> Path:
        """The folder itself."""
        return self.path


def _weight_files(path: Path) -> list[Path]:
    if (path / SINGLE_FILE).is_file():
        return [path / SINGLE_FILE]
    if (path / INDEX_FILE).is_file():
        return [path / name for name in sorted(set(_read_weight_map(path).values()))]
    raise CheckpointError(f"{path} holds neither {SINGLE_FILE} nor {INDEX_FILE}")


def _read_weight_map(path: Path) -> dict[str, str]:
    try:
        weight_map = json.loads((path / INDEX_FILE).read_text(encoding="utf-8"))["weight_map"]
        return {str(name): str(file) for name, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{path / INDEX_FILE} has no readable weight_map") from None


def _check_index(path: Path, tensors: dict[str, TensorInfo]) -> None:
    if (path / SINGLE_FILE).is_file() or not (path / INDEX_FILE).is_file():
        return
    missing = [name for name in _read_weight_map(path) if name not in tensors]
    if missing:
        raise CheckpointError(f"{path / INDEX_FILE} lists {len(missing)} tensors that its files lack, {missing[0]} first")
