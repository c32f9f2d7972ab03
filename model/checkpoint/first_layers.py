"""A view of the first decoder layers of a checkpoint, for models that do not fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from model.checkpoint.source import CheckpointSource, Checksum
from model.spec.config import LlamaConfig
from model.spec.tensor_info import TensorInfo
from parallel.errors import ConfigError
from parallel.file_slices import FileReader, StoredRows
from parallel.lazy_torch import torch

_PREFIX = "model.layers."


def check_num_layers(config: LlamaConfig, num_layers: int) -> None:
    """Raise ConfigError unless the model has at least this many layers."""
    if not 1 <= num_layers <= config.num_hidden_layers:
        raise ConfigError(
            f"--num-layers is {num_layers}, but the model has {config.num_hidden_layers}; ask for 1 to {config.num_hidden_layers}"
        )


class FirstLayers:
    """The first `num_layers` layers of a checkpoint."""

    def __init__(self, whole: CheckpointSource, num_layers: int) -> None:
        self.whole = whole
        self.path: Path = whole.path
        self.config: dict[str, Any] = {**whole.config, "num_hidden_layers": num_layers}
        self.tensors: Mapping[str, TensorInfo] = {
            name: info
            for name, info in whole.tensors.items()
            if not name.startswith(_PREFIX) or int(name.removeprefix(_PREFIX).split(".")[0]) < num_layers
        }
        self.files: Sequence[Path] = whole.files
        self.checksums: Mapping[Path, Checksum] = whole.checksums

    def read_rows(self, reader: FileReader, name: str, start: int, stop: int) -> torch.Tensor:
        """Return rows [start, stop) of a tensor."""
        return self.whole.read_rows(reader, name, start, stop)

    def locate_rows(self, name: str, start: int, stop: int) -> Sequence[StoredRows]:
        """Return where the rows are stored."""
        return self.whole.locate_rows(name, start, stop)

    def tokenizer_path(self) -> Path | None:
        """Return the tokenizer of the full checkpoint."""
        return self.whole.tokenizer_path()
