"""Writes the random weights of `tandem bench --random-weights` as a checkpoint, for benches that need files. Knows no commands."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from model.checkpoint.folder_writing import write_json
from model.checkpoint.random_source import RandomSource
from model.checkpoint.safetensors_file import SafetensorsWriter
from parallel.file_slices import FileReader


def write_random_checkpoint(folder: Path, values: Mapping[str, Any]) -> RandomSource:
    """A new folder with what the values of a config.json describe, tensor by tensor."""
    folder.mkdir()
    source, reader = RandomSource(values, folder), FileReader()
    with SafetensorsWriter(folder / "model.safetensors", source.tensors) as writer:
        for name, info in source.tensors.items():
            writer.write(name, source.read_rows(reader, name, 0, info.shape[0]))
    write_json(folder / "config.json", source.config)
    return source
